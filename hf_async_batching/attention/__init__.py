"""Paged attention: the function that transformers calls, the cache, and the kernels behind it."""
