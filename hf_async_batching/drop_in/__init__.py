"""The drop-in for `model.generate`."""
