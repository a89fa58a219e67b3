"""Studies: a folder each, with its README. Commands of `csalr` run them."""
