"""Finds what keeps an object alive: the shortest way from it to a root, by types and attributes."""

from __future__ import annotations

import gc
import sys
import types
from collections import deque
from typing import Any

_MOST_LEVELS = 24
_MOST_PER_LEVEL = 2000
_PLAIN = (list, tuple, set, frozenset, deque)


def holders(one: object, own: list[Any]) -> str:
    """Return the shortest chain from an object to a module, a class or a running function, the nearest first.

    Args:
        one: The object.
        own: The caller's lists that hold the object; they do not count.

    Returns:
        For instance "tuple in deque in EngineThread._choices in local engine of close, which runs".
    """
    ignored = {id(own), *map(id, own)}
    objects: dict[int, Any] = {id(one): one}
    below: dict[int, int] = {}
    ignored |= {id(objects), id(below)}
    level: list[Any] = [one]
    last, root = one, ""
    for _ in range(_MOST_LEVELS):
        for each in level:
            if root := _local_of_running(each):
                return _told(each, objects, below, root)
        ignored.add(id(level))
        found = gc.get_referrers(*level)
        inner = {id(each) for each in level}
        above: list[Any] = []
        ignored |= {id(found), id(above)}
        for holder in found:
            if id(holder) in objects or id(holder) in ignored or _is_ours(holder):
                continue
            held = next((id(each) for each in gc.get_referents(holder) if id(each) in inner), None)
            if held is None:  # changed meanwhile
                continue
            objects[id(holder)], below[id(holder)] = holder, held
            last = holder
            if root := _root(holder):
                return _told(holder, objects, below, "")
            above.append(holder)
        level = above[:_MOST_PER_LEVEL]
        if not level:
            break
    return _told(last, objects, below, "something that the collector does not see")


def _root(holder: Any) -> str:
    if isinstance(holder, types.ModuleType):
        return f"module {holder.__name__}"
    if isinstance(holder, type) and "<locals>" not in holder.__qualname__:
        return f"class {holder.__qualname__}"
    if isinstance(holder, dict):
        for name, module in list(sys.modules.items()):
            if getattr(module, "__dict__", None) is holder:
                return f"module {name}"
    return ""


def _running() -> list[types.FrameType]:
    frames: list[types.FrameType] = []
    for frame in list(sys._current_frames().values()):
        outer: types.FrameType | None = frame
        while outer is not None:
            if outer.f_globals.get("__name__") not in _MODULES:
                frames.append(outer)
            outer = outer.f_back
    return frames


# Functions that search for remaining objects hold them meanwhile.
_MODULES = {__name__, "benchmarks.soak.watch", "benchmarks.soak.verdict"}


def _local_of_running(one: Any) -> str:
    for frame in _running():
        for name, value in frame.f_locals.items():
            if value is one:
                return f"local {name} of {frame.f_code.co_qualname}, which runs"
    return ""


def _is_ours(holder: Any) -> bool:
    return isinstance(holder, types.FrameType) and holder.f_globals.get("__name__") in _MODULES


def _told(last: Any, objects: dict[int, Any], below: dict[int, int], root: str) -> str:
    """Write the chain in words, from the object to the root."""
    words: list[str] = [root] if root else []
    holder, outer = last, None
    while id(holder) in below:
        inner = objects[below[id(holder)]]
        word = (_root(holder) or _type(holder)) + _name(holder, inner)
        if outer is not None and getattr(outer, "__dict__", None) is holder:
            # An object and the dict of its attributes are one link.
            words[-1] = f"{_root(outer) or _type(outer)}.{_key(holder, inner)}"
        elif not words or words[-1] != word:  # for example frames of a traceback
            words.append(word)
        holder, outer = inner, holder
    return " in ".join(reversed(words))


def _key(named: Any, inner: Any) -> str:
    return next((str(key) for key, value in list(named.items()) if value is inner), "?")


def _type(holder: Any) -> str:
    if isinstance(holder, types.FrameType):
        return f"frame of {holder.f_code.co_qualname}"
    if isinstance(holder, types.FunctionType | types.MethodType):
        return f"{type(holder).__name__} {holder.__qualname__}"
    return type(holder).__qualname__


def _name(holder: Any, inner: Any) -> str:
    """Return the attribute, key or local by which `holder` holds the other object; empty if that says nothing."""
    if isinstance(holder, _PLAIN):
        return ""
    named: Any = None
    if isinstance(holder, dict):
        named = holder
        for key, value in list(named.items()):
            if value is inner:
                return f"[{str(key)[:40]!r}]"
        return ""
    if isinstance(holder, types.FrameType):
        named = holder.f_locals
    else:
        named = getattr(holder, "__dict__", {})
    for key, value in list(named.items()):
        if value is inner:
            return f".{key}"
    for kind in type(holder).__mro__:
        for key in getattr(kind, "__slots__", ()):
            if isinstance(key, str) and getattr(holder, key, None) is inner:
                return f".{key}"
    return ""
