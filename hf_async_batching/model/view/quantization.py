"""Quantized layers in a view: how to share their weights, and how exact they are."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_async_batching.experts.mxfp4_model import Mxfp4InPlaceQuantizer
from hf_async_batching.model.view.wide_tensor import WideTensor


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether any layer computes with quantized weights, and perhaps with quantized activations.

    Rounding errors are then as large as a quantization step: two activations that differ in the last bit can be
    rounded to different steps. Our own MXFP4 experts unpack their weights exactly and round no activation.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    return (quantizer is not None and not isinstance(quantizer, Mxfp4InPlaceQuantizer)) or any(
        is_wrapped(parameter) or has_state(parameter) for parameter in model.parameters()
    )


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor subclass wraps other tensors (torchao, quanto)."""
    return hasattr(type(tensor), "__tensor_flatten__") and not isinstance(tensor, WideTensor)


def has_state(parameter: torch.Tensor) -> bool:
    """Whether a parameter belongs to a quantized layer that writes to the parameter's attributes (bitsandbytes)."""
    kind = type(parameter)
    return (
        isinstance(parameter, nn.Parameter)
        and kind is not nn.Parameter
        and not is_wrapped(parameter)
        and not isinstance(parameter, WideTensor)
        and bool(vars(parameter))
    )


def alias(parameter: torch.Tensor) -> torch.Tensor:
    """Return a new parameter of the same class over the same memory, without attributes."""
    return torch.Tensor._make_subclass(type(parameter), parameter.data, parameter.requires_grad)


def quantized_kinds(view: nn.Module) -> list[str]:
    """Classes of a view's layers whose weights are quantized, sorted; the class of a weight that wraps others."""
    found = set()
    for module in view.modules():
        if any(True for _ in module.children()):
            continue
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        named = next((one for one in tensors if is_wrapped(one) or has_state(one)), None)
        if named is not None and is_wrapped(named):
            found.add(type(named).__name__)
        elif named is not None or any(_packed(one) for one in tensors):
            found.add(type(module).__name__)
    return sorted(found)


def _packed(tensor: torch.Tensor) -> bool:
    """Whether a matrix holds weights in few bits: integers, or floats of one byte."""
    return tensor.dim() >= 2 and (tensor.dtype in (torch.uint8, torch.int8, torch.int32) or _is_float8(tensor))


def _is_float8(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1


def adjust(module: nn.Module) -> None:
    """Prepare a view's quantized layer for the engine.

    4-bit layers of bitsandbytes stay packed as they are. On some CPUs they would otherwise pack a second copy of their
    weights in the first forward. Layers of quanto leave inference mode, because some of their tensors cannot be used
    in it.
    """
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    weight = module._parameters.get("weight")
    if weight is not None and type(weight).__module__.startswith("optimum.quanto"):
        module.forward = types.MethodType(_OutsideInferenceMode(type(module).forward), module)


class _OutsideInferenceMode:
    """A forward that runs outside inference mode and without gradients."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return self._forward(*args, **kwargs)
