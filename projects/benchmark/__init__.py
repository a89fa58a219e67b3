"""What each model costs, measured side by side: `csalr bench`."""
