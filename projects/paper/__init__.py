"""The tables and figures of the paper: `csalr reproduce` and `csalr attention-maps`."""
