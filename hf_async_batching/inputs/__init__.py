"""Turn the arguments of `generate` into a `Request`."""
