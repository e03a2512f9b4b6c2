"""Methods of a model's modules that call wrappers of kernels call something else; all else of them stays."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from hf_async_batching.model.foreign_kernels.kernel_wrappers import rebind_wrappers


def in_torch(value: int) -> int:
    return value


def wrapped(function: Callable[..., Any]) -> Any:
    """As transformers' file of kernels makes one: its code is of that file."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return ("kernel", function(*args))

    wrapper.__code__ = wrapper.__code__.replace(co_filename="/transformers/integrations/hub_kernels.py")
    return wrapper


def helper(value: int) -> int:
    """A function of the same file that is no wrapper."""
    return value


helper.__code__ = helper.__code__.replace(co_filename="/transformers/integrations/hub_kernels.py")
kernel = wrapped(in_torch)


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return decorated


class Layer(nn.Module):
    @counted
    def forward(self, value: int, offset: int = 1, *, factor: int = 10) -> Any:
        return kernel(factor * (value + offset))

    def other(self, value: int) -> int:
        return helper(value)


for method in (Layer.forward, Layer.other):
    method.__module__ = "transformers.models.own.modeling_own"
Layer.forward.__wrapped__.__module__ = "transformers.models.own.modeling_own"  # type: ignore[attr-defined]


def test_a_rebound_method_keeps_its_defaults_and_its_neighbours() -> None:
    layer, untouched, replaced = Layer(), Layer(), list[str]()

    def replace(wrapper: types.FunctionType) -> Callable[..., Any]:
        replaced.append(wrapper.__name__)
        return wrapper.__wrapped__  # type: ignore[attr-defined, no-any-return]

    rebind_wrappers(layer, replace)
    assert replaced == ["in_torch"], "of one file, and no more than the wrappers"
    assert (layer.forward(2), layer.forward(2, 2), layer.forward(2, factor=1)) == (30, 40, 3)
    assert "other" not in vars(layer)
    assert untouched.forward(2) == ("kernel", 30)


def test_none_leaves_a_method_as_it_is() -> None:
    layer = Layer()
    rebind_wrappers(layer, lambda wrapper: None)
    assert "forward" not in vars(layer)
    assert layer.forward(2) == ("kernel", 30)


def test_methods_of_others_are_not_rebound() -> None:
    class Own(nn.Module):
        def forward(self, value: int) -> Any:
            return kernel(value)

    own = Own()
    rebind_wrappers(own, lambda wrapper: in_torch)
    assert own(2) == ("kernel", 2)
