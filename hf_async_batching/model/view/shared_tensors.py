"""Find every tensor that a copy of a module tree would copy, so that the copy can share it instead.

Weights are not only parameters and buffers: quantized layers keep them in attributes of parameters, in state objects
and in plain attributes.
"""

from __future__ import annotations

import types
import weakref
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig

# Types that `copy.deepcopy` does not enter, or that hold no tensors.
_LEAVES = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    weakref.ref,
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    torch.dtype,
    torch.device,
    PreTrainedConfig,
)


def tensors_within(root: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor that `copy.deepcopy(root)` would reach, each once.

    The attributes of a tensor are searched too. Tensors that a tensor subclass wraps are not: they stay with it.
    """
    stack, seen = [root], set[int]()
    while stack:
        value = stack.pop()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
        if isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            stack.extend(value)
        elif isinstance(value, types.MethodType):
            stack.append(value.__self__)
        elif isinstance(value, partial):
            stack.extend((value.func, value.args, value.keywords))
        stack.extend(getattr(value, "__dict__", {}).values())
        for kind in type(value).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            stack.extend(getattr(value, name, None) for name in ((slots,) if isinstance(slots, str) else slots))
