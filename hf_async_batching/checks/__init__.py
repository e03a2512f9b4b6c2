"""Check that an engine computes what plain `generate` computes."""
