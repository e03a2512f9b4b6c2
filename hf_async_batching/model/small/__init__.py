"""Small copies of a config, and the lengths at which a model's computation changes."""
