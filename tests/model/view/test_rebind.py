"""Functions made anew for copied modules."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from hf_async_batching.model.view.rebind import rebind


class Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, suffix: str = "") -> str:
        return self.name + suffix


class Calls:
    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __getstate__(self) -> Any:
        raise TypeError("not to be pickled")


def wrap(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, mark: str = "!") -> Any:
        return function(*args) + mark

    return wrapper


def test_whatever_refers_to_the_original_refers_to_its_copy() -> None:
    original, copied, other = Named("original"), Named("copy"), Named("other")
    copies = {id(original): copied}
    method = original.forward
    for function in (
        method,
        wrap(method),
        wrap(Calls(wrap(method))),
        functools.partial(wrap(Named.forward), original),
        functools.partial(lambda module: module.forward(), module=original),
        wrap(Named.forward).__get__(original),
    ):
        assert function().startswith("original")
        assert rebind(function, copies)() == function().replace("original", "copy")
        assert function().startswith("original"), "the original's own functions stay as they are"
    assert rebind(wrap(method), copies)("?") == "copy?!"
    assert rebind(original, copies) is copied
    assert rebind(other, copies) is other


def test_what_refers_to_no_original_is_itself() -> None:
    other = Named("other")
    for value in (wrap(other.forward), other.forward.__func__, functools.partial(wrap, 1), 5, None, Named, len):
        assert rebind(value, {}) is value


def test_circles_and_empty_cells() -> None:
    original, copied = Named("original"), Named("copy")

    def calls_itself(depth: int) -> str:
        return calls_itself(depth - 1) if depth else original()

    assert rebind(calls_itself, {id(original): copied})(0) == "copy"

    def early() -> str:
        return original() + late

    again = rebind(early, {id(original): copied})
    late = "!"
    assert early() == "original!"
    assert again is not early


def test_compiled_functions_are_taken_for_what_was_compiled() -> None:
    original, copied = Named("original"), Named("copy")
    compiled = torch.compile(original.forward, backend="eager")
    assert rebind(compiled, {id(original): copied})() == "copy"
