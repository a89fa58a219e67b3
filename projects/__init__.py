"""Studies: one folder per study, with a README. Commands of `csalr` run them."""
