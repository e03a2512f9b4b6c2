"""What a view must know of quantized layers: how their weights are shared, and how exact they are."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_async_batching.model.view.wide_tensor import WideTensor


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether any layer computes with quantized weights, and perhaps with quantized activations.

    Rounding errors are then as large as the steps of the quantization: activations that differ in their last bit
    can fall to either side.
    """
    return getattr(model, "hf_quantizer", None) is not None or any(
        is_wrapped(parameter) or has_state(parameter) for parameter in model.parameters()
    )


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor is made of others (torchao, quanto)."""
    return hasattr(type(tensor), "__tensor_flatten__") and not isinstance(tensor, WideTensor)


def has_state(parameter: torch.Tensor) -> bool:
    """Whether a parameter is of a quantized kind whose layer writes to its attributes (bitsandbytes)."""
    kind = type(parameter)
    return (
        isinstance(parameter, nn.Parameter)
        and kind is not nn.Parameter
        and not is_wrapped(parameter)
        and not isinstance(parameter, WideTensor)
        and bool(vars(parameter))
    )


def alias(parameter: torch.Tensor) -> torch.Tensor:
    """Another parameter of the same kind over the same memory, with no attributes yet."""
    return torch.Tensor._make_subclass(type(parameter), parameter.data, parameter.requires_grad)


def adjust(module: nn.Module) -> None:
    """Make a quantized layer of a view fit for the engine.

    4-bit layers of bitsandbytes stay as they are packed: for some CPUs they would pack themselves anew in their first
    forward, into a second copy. Layers of quanto leave inference mode, in which some of its tensors cannot be used.
    """
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    weight = module._parameters.get("weight")
    if weight is not None and type(weight).__module__.startswith("optimum.quanto"):
        module.forward = types.MethodType(_OutsideInferenceMode(type(module).forward), module)


class _OutsideInferenceMode:
    """A forward that runs without gradients, and not in inference mode."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return self._forward(*args, **kwargs)
