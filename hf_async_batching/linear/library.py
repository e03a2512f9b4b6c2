"""Products by the vendor's library, asked for in the way that finds its faster kernel.

torch multiplies by cuBLAS, and where a bias is added by cuBLASLt, which chooses among the same kernels in its own way.
For an inner dimension that is long beside the outputs, cuBLASLt's choice was the better one on an H100: 14336 to 4096
with 128 rows in 46.8 instead of 54.6 microseconds, with 384 in 64.8 instead of 86.1. So such a product gets a bias of
zeros. (With 512 rows and more both take the same; outputs of other shapes are up to 3 % slower with it.)
"""

from __future__ import annotations

import functools

import torch
from torch.nn.functional import linear

from hf_async_batching.runtime.forking import ForkSafeLock

# Where it was measured to pay: rows below this, and inner dimensions from this on.
_BELOW_ROWS, _FROM_INNER = 512, 8192
_MOST_OUTPUTS = 1 << 15

_zeros: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
_making = ForkSafeLock()


def library_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias`.

    Args:
        x: [..., k].
        weight: [n, k].
        bias: [n] or None.

    Returns:
        [..., n].
    """
    return linear(x, weight, zeros_for(x, weight) if bias is None and gains_by_bias(x, weight) else bias)


def gains_by_bias(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product without a bias is likely to be faster with one of zeros."""
    n, k = weight.shape
    return (
        x.is_cuda
        and x.dtype == weight.dtype
        and x.dtype.itemsize == 2
        and k >= max(_FROM_INNER, 2 * n)
        and n <= _MOST_OUTPUTS
        and 1 < x.numel() // k < _BELOW_ROWS
        and _chooses_so(x.device)
    )


@functools.cache
def _chooses_so(device: torch.device) -> bool:
    """Whether a card is of the kind on which it was measured."""
    return torch.cuda.get_device_capability(device)[0] == 9


def zeros_for(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """Zeros [n] that all products of a device share; None where they must not be made now."""
    key = (x.device, x.dtype)
    found = _zeros.get(key)
    if found is None:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # they would be made when the graph runs, and lie in its memory
        with _making:
            found = _zeros.get(key)
            if found is None:
                # Never freed, since graphs go on reading it.
                found = torch.zeros(_MOST_OUTPUTS, dtype=x.dtype, device=x.device)
                # Read back, so that they are there for the streams of other engines, too.
                found[0].item()
                _zeros[key] = found
    return found[: weight.shape[0]]
