"""Mixtures of experts: the experts function that transformers calls, and its kernels."""
