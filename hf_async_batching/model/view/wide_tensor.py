"""Weights that are stored in one dtype and used in a wider one."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

# Smaller tensors are converted once: they need little memory, and kernels of other packages need plain tensors.
_SMALL = 1 << 20


class WideTensor(torch.Tensor):
    """A tensor that shows the values of a narrow tensor in a wider dtype.

    Each operation converts its input and drops the converted copy, so a model of 60 GB in bfloat16 computes in float32
    with only its largest weight as extra memory.

    Args:
        narrow: Float tensor of any shape; its memory is shared.
        dtype: The wider dtype.
    """

    _narrow: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, narrow: torch.Tensor, dtype: torch.dtype) -> WideTensor:
        """Make a tensor without storage of its own."""
        # torch counts the versions of a weight's views, in inference mode too, and inference tensors have no counter.
        with torch.inference_mode(False):
            made: WideTensor = torch.Tensor._make_wrapper_subclass(
                cls, narrow.size(), strides=narrow.stride(), dtype=dtype, device=narrow.device, requires_grad=False
            )
        made._narrow = narrow
        return made

    def __init__(self, narrow: torch.Tensor, dtype: torch.dtype) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"WideTensor({tuple(self.shape)}, {self.dtype}, kept in {self._narrow.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, WideTensor) and func.is_view:
            # A view takes one expert out of many, so the view comes first and the conversion later.
            dtype = first.dtype
            out = func(first._narrow, *args[1:], **kwargs)
            return tree_map(lambda value: WideTensor(value, dtype) if isinstance(value, torch.Tensor) else value, out)
        return func(*tree_map(_widened, args), **tree_map(_widened, kwargs))


def _widened(value: Any) -> Any:
    return value._narrow.to(value.dtype) if isinstance(value, WideTensor) else value


def widen_weights(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let a module and its submodules compute in a wider dtype. Large weights stay shared.

    Args:
        module: A copy that belongs to the engine; its parameters and buffers are replaced.
        dtype: The wider dtype.
    """
    wide: dict[int, torch.Tensor] = {}

    def of(tensor: torch.Tensor, *, lazily: bool) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.dtype.itemsize >= dtype.itemsize:
            return tensor
        if id(tensor) not in wide:
            lazy = lazily and tensor.numel() > _SMALL
            made = WideTensor(tensor.detach(), dtype) if lazy else tensor.detach().to(dtype)
            wide[id(tensor)] = torch.nn.Parameter(made, requires_grad=False) if lazily else made
        return wide[id(tensor)]

    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None:
                one._parameters[name] = of(parameter, lazily=True)  # type: ignore[assignment]
        for name, buffer in one._buffers.items():
            if buffer is not None:
                one._buffers[name] = of(buffer, lazily=False)
