"""Makes functions that hold on to a model's modules anew, for the copies of these modules.

Libraries replace `forward` by a method of the module whose closure holds the forward that was there before (TRL,
accelerate): copied as it is, it would run the original.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

_EMPTY = object()
_Make = Callable[[list[Any]], Any]


def rebound(value: Any, copies: dict[int, Any]) -> Any:
    """`value` with copies in the place of the modules that it refers to; `value` itself where it refers to none.

    Args:
        value: A module, a method, a function with its closure, a partial function, or an object that calls what it
            holds; anything else is returned. What torch.compile made of one of them is taken for the original.
        copies: Copied modules by identity of the original.
    """
    return _rebound(value, copies, {})


def _rebound(value: Any, copies: dict[int, Any], done: dict[int, Any]) -> Any:
    if id(value) in done:
        return done[id(value)]
    done[id(value)] = value  # for whatever refers back to it
    if isinstance(value, nn.Module):
        result = copies.get(id(value), value)
    elif hasattr(value, "_torchdynamo_orig_callable"):
        result = _rebound(value._torchdynamo_orig_callable, copies, done)
    else:
        parts, make = _taken_apart(value)
        made = [_rebound(part, copies, done) for part in parts]
        result = value if all(new is old for new, old in zip(made, parts, strict=True)) else make(made)
    done[id(value)] = result
    return result


def _taken_apart(value: Any) -> tuple[list[Any], _Make]:
    """What a callable holds, and how another one is made of other parts."""
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
