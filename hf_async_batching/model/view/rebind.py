"""Rebuild functions that refer to a model's modules, so that they refer to the copies of these modules.

Libraries such as TRL and accelerate replace `forward` by a method whose closure holds the previous forward. A plain
copy of such a method would run the original module.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

_EMPTY = object()
_Make = Callable[[list[Any]], Any]


def rebind(value: Any, copies: dict[int, Any]) -> Any:
    """Return `value` with every module in it replaced by its copy, or `value` itself if it refers to no module.

    Args:
        value: A module, a method, a function with its closure, a partial function, or an object that calls what it
            holds; anything else is returned unchanged. A compiled function counts as its original.
        copies: Copied modules by identity of the original.
    """
    return _rebind(value, copies, {})


def _rebind(value: Any, copies: dict[int, Any], done: dict[int, Any]) -> Any:
    if id(value) in done:
        return done[id(value)]
    done[id(value)] = value  # for objects that refer back to it
    if isinstance(value, nn.Module):
        result = copies.get(id(value), value)
    elif hasattr(value, "_torchdynamo_orig_callable"):
        result = _rebind(value._torchdynamo_orig_callable, copies, done)
    else:
        parts, make = _taken_apart(value)
        made = [_rebind(part, copies, done) for part in parts]
        result = value if all(new is old for new, old in zip(made, parts, strict=True)) else make(made)
    done[id(value)] = result
    return result


def _taken_apart(value: Any) -> tuple[list[Any], _Make]:
    """Return the parts that a callable holds, and a function that builds a new one from other parts."""
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__], lambda parts: types.MethodType(*parts)
    if isinstance(value, partial):
        held, count = [value.func, *value.args, *value.keywords.values()], len(value.args) + 1
        return held, lambda parts: partial(*parts[:count], **dict(zip(value.keywords, parts[count:], strict=True)))
    if isinstance(value, types.FunctionType):
        return [_contents(cell) for cell in value.__closure__ or ()], partial(_with_cells, value)
    if callable(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
        return list(vars(value).values()), partial(_with_attributes, value)
    return [], lambda _: value


def _with_cells(function: types.FunctionType, contents: list[Any]) -> types.FunctionType:
    cells = tuple([types.CellType() if content is _EMPTY else types.CellType(content) for content in contents])
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    return made


def _with_attributes(value: Any, attributes: list[Any]) -> Any:
    made = object.__new__(type(value))
    vars(made).update(zip(vars(value), attributes, strict=True))
    return made


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY
