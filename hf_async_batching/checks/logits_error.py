"""By how much logits differ, and by how much rounding alone may make them differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hf_async_batching.model.view.quantization import is_quantized

if TYPE_CHECKING:
    from hf_async_batching.model.forward.cache_forward import CacheForward
    from hf_async_batching.model.forward.packed_forward import PackedForward

# Relative error of the logits that rounding alone explains: sums in another order, not another result.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_TF32_TOLERANCE = 5e-3
_QUANTIZED_TOLERANCE = 5e-2


def logits_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative norm of the difference.

    An infinity that both have is no difference: some models give -inf to tokens that only fill their vocabulary up.
    """
    difference, size = _parts(got, want)
    return float(difference.norm() / size.norm().clamp(min=1e-6))


def worst_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest `logits_error` of all positions, of logits [positions, vocab]."""
    difference, size = _parts(got, want)
    return float((difference.norm(dim=-1) / size.norm(dim=-1).clamp(min=1e-6)).max())


def _parts(got: torch.Tensor, want: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The difference, and what it is relative to."""
    return (got - want).masked_fill(got == want, 0), want.masked_fill(want.isinf(), 0)


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative error that rounding explains in a dtype."""
    return _TOLERANCE.get(dtype, 1e-1)


def logits_tolerance(forward: PackedForward | CacheForward) -> float:
    """The error that rounding alone explains."""
    dtype = forward.dtype
    weights = max(forward.view.parameters(), key=torch.Tensor.numel, default=torch.empty(0)).dtype
    if weights.is_floating_point and weights.itemsize < dtype.itemsize:
        dtype = weights  # some families return logits in float32, whatever they computed in
    if is_quantized(forward.view):
        return max(_QUANTIZED_TOLERANCE, _TOLERANCE.get(dtype, 1e-1))
    if dtype == torch.float32 and forward.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return _TF32_TOLERANCE
    return _TOLERANCE.get(dtype, 1e-1)
