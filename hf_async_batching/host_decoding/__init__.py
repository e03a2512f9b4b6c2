"""Requests whose tokens are chosen on the host, by a caller's own logits processors."""
