"""The ranks over which one model is sharded."""
