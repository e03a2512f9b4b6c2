"""The difference of logits that rounding alone can cause."""

from __future__ import annotations

import torch

from hf_async_batching.linear.rounding import rounding_tolerance
from hf_async_batching.model.forward.cache_forward import CacheForward
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.view.quantization import is_quantized

_TF32_TOLERANCE = 5e-3
_QUANTIZED_TOLERANCE = 5e-2


def logits_tolerance(forward: PackedForward | CacheForward) -> float:
    """The relative error of logits that rounding alone can cause, for a forward's dtype, weights and device."""
    dtype = forward.dtype
    weights = max(forward.view.parameters(), key=torch.Tensor.numel, default=torch.empty(0)).dtype
    if weights.is_floating_point and weights.itemsize < dtype.itemsize:
        dtype = weights  # some families compute in 16 bits and return logits in float32
    if is_quantized(forward.view):
        return max(_QUANTIZED_TOLERANCE, rounding_tolerance(dtype))
    if dtype == torch.float32 and forward.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return _TF32_TOLERANCE
    return rounding_tolerance(dtype)
