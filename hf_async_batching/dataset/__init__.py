"""A model over a whole dataset: `generate_dataset`."""
