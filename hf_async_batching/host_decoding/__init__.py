"""Choose tokens on the host, for requests with a caller's own logits processors."""
