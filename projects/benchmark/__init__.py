"""The benchmark, `csalr bench`: the cost of the models, measured side by side."""
