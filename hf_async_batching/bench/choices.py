"""The choices of the command `bench`; imports no torch."""

from __future__ import annotations

QUANTIZATIONS = ("nf4", "fp8", "mxfp4")
"""Quantized linear layers (nf4 by bitsandbytes, fp8 in blocks) or experts (mxfp4, of gpt-oss)."""

PEERS = ("generate_batch", "generate")
"""Other ways of serving the same work."""

SWITCHES = {
    "no_compile": "compile",
    "no_fuse": "fuse_weights",
    "no_graphs": "cuda_graphs",
    "no_prefix_cache": "prefix_cache",
}
"""Switches that turn a setting of `BatchingConfig` off."""

SIZES = ("page_size", "max_batch_tokens", "max_rows")
"""Settings of `BatchingConfig` that have options with their names."""
