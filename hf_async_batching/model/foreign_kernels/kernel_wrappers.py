"""Rebind those methods of a model copy that call kernels of other packages.

Transformers has a torch implementation of each such kernel, inside a wrapper that chooses between the two when the
modelling file is imported. A method finds the wrapper among its globals. So a copy of the method, with other globals,
is set on the instance. Neither transformers nor any other model is affected.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

# The file of transformers that defines the wrappers.
_WRAPPERS = "hub_kernels.py"
_MARK = "_hf_async_batching_kernels"


def rebind_wrappers(model: nn.Module, replace: Callable[[types.FunctionType], Callable[..., Any] | None]) -> None:
    """Let a model's modules call something else where they call a wrapper.

    Args:
        model: A copy that belongs to the engine.
        replace: Returns the function to call instead of a wrapper, or None to keep the wrapper.
    """
    for module in model.modules():
        for name, method in _methods(type(module)):
            if name in vars(module):
                continue  # set by the user, or already rebound
            called: dict[str, Any] = {name: method.__globals__.get(name) for name in method.__code__.co_names}
            wrappers = {name: found for name, value in called.items() if (found := _wrapper(value)) is not None}
            replaced = {name: made for name, found in wrappers.items() if (made := replace(found)) is not None}
            if replaced:
                setattr(module, name, types.MethodType(with_globals(method, replaced), module))


def with_globals(method: types.FunctionType, changed: dict[str, Any]) -> types.FunctionType:
    """A copy of a function that finds other values under some names of its globals."""
    values = {**method.__globals__, **changed}
    # By this name the compiler would look up the module's own values.
    values.pop("__name__", None)
    made = types.FunctionType(method.__code__, values, method.__name__, method.__defaults__, method.__closure__)
    made.__kwdefaults__, made.__module__ = method.__kwdefaults__, method.__module__
    vars(made)[_MARK] = True
    return made


def is_rebound(method: Any) -> bool:
    """Whether a method set on a module is its class's own method with other kernels."""
    return hasattr(getattr(method, "__func__", None), _MARK)


def _methods(cls: type) -> Iterator[tuple[str, types.FunctionType]]:
    """Methods of a class, without their decorators."""
    for name in dir(cls):
        method = inspect.unwrap(inspect.getattr_static(cls, name))
        if isinstance(method, types.FunctionType) and method.__module__.startswith("transformers.models."):
            yield name, method


def _wrapper(value: Any) -> types.FunctionType | None:
    """The wrapper that a function is or wraps, if any."""
    while isinstance(value, types.FunctionType):
        if Path(value.__code__.co_filename).name == _WRAPPERS and hasattr(value, "__wrapped__"):
            return value
        value = getattr(value, "__wrapped__", None)
    return None
