"""Small copies of a config, and the lengths at which a config changes what a model computes."""
