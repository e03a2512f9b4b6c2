"""By how much logits differ, and by how much rounding alone may make them differ."""

from __future__ import annotations

import torch

from hf_async_batching.cache_forward import CacheForward
from hf_async_batching.model_forward import ModelForward
from hf_async_batching.quantization import is_quantized

# Relative error of the logits that rounding alone explains: sums in another order, not another result.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_TF32_TOLERANCE = 5e-3
_QUANTIZED_TOLERANCE = 5e-2


def logits_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative norm of the difference."""
    return float((got - want).norm() / want.norm().clamp(min=1e-6))


def worst_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest `logits_error` of all positions, of logits [positions, vocab]."""
    error = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-6)
    return float(error.max())


def logits_tolerance(forward: ModelForward | CacheForward) -> float:
    """The error that rounding alone explains."""
    dtype = forward.dtype
    if is_quantized(forward.view):
        return max(_QUANTIZED_TOLERANCE, _TOLERANCE.get(dtype, 1e-1))
    if dtype == torch.float32 and forward.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return _TF32_TOLERANCE
    return _TOLERANCE.get(dtype, 1e-1)
