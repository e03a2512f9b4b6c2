"""From the arguments of `generate` to a `Request`."""
