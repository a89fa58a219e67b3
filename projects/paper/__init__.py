"""Every table and figure of the paper: `csalr reproduce` and `csalr attention-maps`."""
