"""The house: rooms import rooms below them, files import in no circle, files are small, rooms begin empty.

Each rule is a function from the files' syntax trees to sentences about what breaks it, so that a broken house can be
shown to it. Imports inside functions and under `TYPE_CHECKING` count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ROOMS = [
    *("errors", "core", "config", "kv_cache", "runtime", "token_stream", "text_stream", "handle"),
    *("scheduler", "devices", "sampling", "stopping", "host_decoding"),
    *("attention", "recurrent", "linear", "experts", "inputs", "distributed"),
    *("model.small", "model.foreign_kernels", "model.view", "model.compile", "model.forward"),
    *("runner", "checks", "engine", "manager", "registry", "drop_in", "dataset", "coverage", "__init__"),
    "bench",
    *("demo.serving", "demo.chat", "demo.wall", "demo.compare", "demo.dataset", "demo.page", "demo", "demo.tools"),
    *("cli", "__main__"),
]
"""From the ground up. A room imports rooms before it. A file in the package's own folder is a room of its own."""

UP = {
    ("hf_async_batching.manager", "hf_async_batching.drop_in.generate"):
        "a method of the manager, `bind`, makes the drop-in's callable; it imports it when it is called",
}  # fmt: skip
"""Imports of a room above, by file and imported file: why each stays."""

LONGEST = 450

SAYING_MORE = {"hf_async_batching"}
"""Packages whose `__init__` holds more than a docstring: the whole package exports its public names."""

Trees = Mapping[str, ast.Module]


def read() -> dict[str, ast.Module]:
    """The syntax tree of each file of the package and of the demo, by dotted name; a package's ends in `.__init__`."""
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text(encoding="utf-8"))
        for folder in ("hf_async_batching", "demo")
        for file in sorted((ROOT / folder).rglob("*.py"))
    }


def imports_of(name: str, trees: Trees) -> Iterator[str]:
    """The files that a file imports, anywhere in it."""

    def files(dotted: str) -> Iterator[str]:
        yield from (one for one in (dotted, f"{dotted}.__init__") if one in trees and one != name)

    for node in ast.walk(trees[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from files(alias.name)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(name.split(".")[: -node.level]) if node.level else ""
            origin = ".".join(filter(None, (package, node.module)))
            for alias in node.names:
                yield from list(files(f"{origin}.{alias.name}")) or files(origin)


def room_of(name: str) -> str:
    top, *inner = name.split(".")
    if top != "hf_async_batching":
        return f"{top}.{inner[0]}" if len(inner) > 1 else top
    return ".".join(inner[:2]) if inner[0] == "model" and len(inner) > 2 else inner[0]


def arrows_up(trees: Trees) -> list[str]:
    found = []
    for name in trees:
        if name == "hf_async_batching.model.__init__":
            continue
        for other in set(imports_of(name, trees)):
            here, there = room_of(name), room_of(other)
            if here != there and ROOMS.index(there) > ROOMS.index(here) and (name, other) not in UP:
                found.append(f"{name} imports {other}, of a room above")
    return sorted(found)


def circles(trees: Trees) -> list[str]:
    """Files from which imports lead back to themselves, each circle once."""
    after = {name: {other for other in imports_of(name, trees) if (name, other) not in UP} for name in trees}
    left = dict(after)
    while ends := [name for name, others in left.items() if not others & left.keys()]:
        for name in ends:  # nothing that is left is reached from there
            del left[name]
    found: set[frozenset[str]] = set()
    for name in left:
        path = [name]
        while path[-1] not in path[:-1]:
            path.append(min(after[path[-1]] & left.keys()))
        found.add(frozenset(path[path.index(path[-1]) :]))
    return sorted(" and ".join(sorted(one)) + " import each other in a circle" for one in found)


def long_files(lines: Mapping[str, int]) -> list[str]:
    return [f"{name} has {count} lines" for name, count in lines.items() if count > LONGEST]


def saying_more(trees: Trees) -> list[str]:
    return [
        f"{name} holds more than a docstring"
        for name, tree in trees.items()
        if name.endswith(".__init__")
        and name.removesuffix(".__init__") not in SAYING_MORE
        and len(tree.body) > bool(ast.get_docstring(tree))
    ]


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return read()


def test_every_file_is_in_a_room(trees: Trees) -> None:
    rooms = {room_of(name) for name in trees} - {"model"}
    assert rooms == set(ROOMS)


def test_rooms_import_rooms_below(trees: Trees) -> None:
    assert arrows_up(trees) == []


def test_files_import_in_no_circle(trees: Trees) -> None:
    assert circles(trees) == []


def test_exceptions_are_still_needed(trees: Trees) -> None:
    for name, other in UP:
        assert other in set(imports_of(name, trees)), f"{name} does not import {other} any more: take it out of `UP`"


def file_lines() -> dict[str, int]:
    return {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for folder in ("hf_async_batching", "demo")
        for file in sorted((ROOT / folder).rglob("*.py"))
    }


def test_files_are_small() -> None:
    assert long_files(file_lines()) == []


def test_rooms_begin_empty(trees: Trees) -> None:
    assert saying_more(trees) == []


def house(**files: str) -> dict[str, ast.Module]:
    return {f"hf_async_batching.{name.replace('__', '.')}": ast.parse(text) for name, text in files.items()}


@pytest.mark.parametrize(
    "text",
    [
        "from hf_async_batching.runner.pipeline import Pipeline",
        "import hf_async_batching.runner.pipeline",
        "from hf_async_batching.runner import pipeline",
        "from ..runner import pipeline",
        "from ..runner.pipeline import Pipeline",
        "def lazily():\n    from hf_async_batching.runner.pipeline import Pipeline",
        "if TYPE_CHECKING:\n    from hf_async_batching.runner.pipeline import Pipeline",
    ],
)
def test_an_arrow_up_is_found(text: str) -> None:
    broken = house(scheduler__plan=text, runner__pipeline="")
    assert arrows_up(broken) == [
        "hf_async_batching.scheduler.plan imports hf_async_batching.runner.pipeline, of a room above"
    ]
    allowed = house(scheduler__plan="", runner__pipeline="from hf_async_batching.scheduler.plan import Plan")
    assert arrows_up(allowed) == []


def test_rooms_within_the_model_have_an_order() -> None:
    text = "from hf_async_batching.model.forward.probe import probe"
    assert arrows_up(house(model__view__copy=text, model__forward__probe=""))
    assert not arrows_up(house(runner__copy=text, model__forward__probe=""))


def test_circles_are_found() -> None:
    one = "from hf_async_batching.core.{} import x"
    broken = house(core__a=one.format("b"), core__b=one.format("c"), core__c=one.format("a"), core__d=one.format("a"))
    names = " and ".join(f"hf_async_batching.core.{name}" for name in "abc")
    assert circles(broken) == [f"{names} import each other in a circle"]
    assert circles(house(core__a=one.format("b"), core__b=one.format("c"), core__c="")) == []


def test_long_files_are_found() -> None:
    assert long_files({"a.py": LONGEST, "b.py": LONGEST + 1}) == [f"b.py has {LONGEST + 1} lines"]


@pytest.mark.parametrize("text", ['"""Doc."""\nfrom hf_async_batching.core.plan import Plan', "import os", "X = 1"])
def test_a_room_that_says_more_is_found(text: str) -> None:
    file = "hf_async_batching.core.__init__"
    assert saying_more({file: ast.parse(text)}) == [f"{file} holds more than a docstring"]
    assert saying_more({file: ast.parse('"""Doc."""')}) == []
