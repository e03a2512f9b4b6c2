"""From logits to tokens, one job a file."""
