"""What keeps an object alive is named by types and attributes, from the object to a root."""

from __future__ import annotations

import gc
import threading
from collections import deque
from typing import Any

import pytest

from benchmarks.soak.holders import holders


class Held:
    """What is looked for."""


class Owner:
    """Has attributes."""

    def __init__(self, held: Any) -> None:
        self.orders = deque([(held, 1)])

    def run(self) -> None:
        """Not called."""


class Slotted:
    """Has slots."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


_kept: list[Any] = []


@pytest.fixture(autouse=True, scope="module")
def nothing_frozen() -> Any:
    """Let the collector see this module, which froze with all that was imported."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_kept() -> Any:
    yield
    _kept.clear()


def _raised() -> ValueError:
    wanted = Held()
    try:
        raise ValueError("holds the frame of this function")
    except ValueError as error:
        return error
    finally:
        assert wanted


def _make(way: str) -> None:
    if way == "queue":
        _kept.append(Owner(Held()).run)
    elif way == "traceback":
        _kept.append(Slotted(_raised()))
    elif way == "dict":
        _kept.append({"one": {"two": Held()}})
    elif way == "closure":
        held = Held()
        _kept.append(lambda: held)


def _chain() -> str:
    """The only object there is, without a local that holds it."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one) is Held]
    assert len(found) == 1
    return holders(found.pop(), [found])


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("queue", "tuple in deque in Owner.orders in method Owner.run in list in module {name}['_kept']"),
        (
            "traceback",
            "frame of _raised.wanted in traceback in ValueError in Slotted.error in list in module {name}['_kept']",
        ),
        ("dict", "dict['two'] in dict['one'] in list in module {name}['_kept']"),
        ("closure", "cell in tuple in function _make.<locals>.<lambda> in list in module {name}['_kept']"),
    ],
)
def test_the_chain_leads_from_the_object_to_a_module(way: str, expected: str) -> None:
    _make(way)
    assert _chain() == expected.format(name=__name__)


def test_a_local_of_another_thread_is_named() -> None:
    begun, ends = threading.Event(), threading.Event()

    def waits() -> None:
        wanted = [Held()]
        begun.set()
        ends.wait(60)
        wanted.clear()

    thread = threading.Thread(target=waits)
    thread.start()
    assert begun.wait(60)
    try:
        chain = _chain()
    finally:
        ends.set()
        thread.join()
    assert chain == ("list in local wanted of test_a_local_of_another_thread_is_named.<locals>.waits, which runs")
