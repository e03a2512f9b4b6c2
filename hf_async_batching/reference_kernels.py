"""Lets a model of our own compute with transformers' own code where it would call kernels of other packages.

Transformers takes flash-linear-attention, causal-conv1d and mamba-ssm where they are installed, whatever the device;
none of them runs on a CPU. What they stand for is written in torch beside each call, under the wrapper that chooses.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

_PACKAGES = ("fla", "causal_conv1d", "mamba_ssm", "kernels")
# The file of transformers whose wrappers choose between a package's kernel and the function in torch.
_CHOOSERS = "hub_kernels.py"


def use_reference_kernels(model: nn.Module) -> None:
    """Bind methods of a model's modules to the functions in torch that kernels of other packages stand for.

    Nothing changes where no such package is installed, and nothing but this model ever does.

    Args:
        model: A model that nobody else uses.
    """
    if not any(find_spec(package) for package in _PACKAGES):
        return
    for module in model.modules():
        for name, method in _methods(type(module)):
            references = _references(method)
            if references:
                bound = types.FunctionType(
                    method.__code__,
                    {**method.__globals__, **references},
                    method.__name__,
                    method.__defaults__,
                    method.__closure__,
                )
                bound.__kwdefaults__ = method.__kwdefaults__
                setattr(module, name, types.MethodType(bound, module))


def _methods(cls: type) -> Iterator[tuple[str, types.FunctionType]]:
    """Methods of a class as written, without what decorates them."""
    for name in dir(cls):
        method = inspect.unwrap(inspect.getattr_static(cls, name))
        if isinstance(method, types.FunctionType) and method.__module__.startswith("transformers.models."):
            yield name, method


def _references(method: types.FunctionType) -> dict[str, Any]:
    """By name, the functions in torch behind the wrappers that a method calls."""
    called: dict[str, Any] = {name: method.__globals__.get(name) for name in method.__code__.co_names}
    return {name: inspect.unwrap(value) for name, value in called.items() if _chooses(value)}


def _chooses(value: Any) -> bool:
    """Whether a function is such a wrapper, or wraps one."""
    while isinstance(value, types.FunctionType):
        if Path(value.__code__.co_filename).name == _CHOOSERS:
            return hasattr(value, "__wrapped__")
        value = getattr(value, "__wrapped__", None)
    return False
