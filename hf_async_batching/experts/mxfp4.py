"""MXFP4 weights in PyTorch: what the kernels that read them are compared with.

The format is OCP's Microscaling Formats (MX) v1.0: groups of 32 values e2m1 (a sign, two bits of exponent, one of
mantissa) with one scale e8m0, a power of two.
"""

from __future__ import annotations

import torch

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST_SCALE = 128
"""The largest scale that our kernels read: 2 ** (128 - 127). A quantizer chooses it for weights of 12."""


def dequantize(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """MXFP4 weights as plain ones, rounded once.

    Args:
        blocks: Uint8 [..., groups, 16]: two values in a byte, the even one in the low bits.
        scales: Uint8 [..., groups]: powers of two plus 127.
        dtype: The dtype of the result.

    Returns:
        [..., groups * 32].
    """
    values = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], device=blocks.device)
    byte = torch.arange(256, device=blocks.device)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], dim=-1)
    exponents = (scales.int() - 127)[..., None, None]
    return torch.ldexp(pairs[blocks.int()], exponents).to(dtype).flatten(-3)
