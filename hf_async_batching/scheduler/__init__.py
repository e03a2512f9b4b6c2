"""Choose what the next step computes. Integers only; no torch, no threads."""
