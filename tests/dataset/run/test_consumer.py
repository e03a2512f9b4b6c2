"""Rows reach the caller in their order."""

from __future__ import annotations

from queue import Empty
from typing import Any

import pytest

from hf_async_batching import DatasetRowError
from hf_async_batching.dataset.rows.row import Completion, RowResult
from hf_async_batching.dataset.run.consumer import Consumer, in_order


def test_each_row_is_released_after_its_use_in_order() -> None:
    released: list[int] = []
    rows = in_order((RowResult(index) for index in (2, 0, 1, 3)), released.append)
    seen = []
    for row in rows:
        assert released == seen, "the row in use is not released yet"
        seen.append(row.index)
    assert seen == released == [0, 1, 2, 3]


class Run:
    """A run that has finished these rows, and a moment in which it has none."""

    def __init__(self, *results: RowResult | None) -> None:
        self.results, self.calls = [*results], list[str]()

    def start(self) -> None:
        self.calls.append("start")

    def result(self, timeout: float) -> RowResult | None:
        if not self.results:
            raise Empty
        return self.results.pop(0)

    def stop(self) -> list[RowResult]:
        self.calls.append("stop")
        return [result for result in self.results if result is not None]


class Shown:
    def __init__(self, run: Run) -> None:
        self.run = run

    def __getattr__(self, name: str) -> Any:
        def note(*arguments: Any) -> None:
            self.run.calls.append(f"{name}{arguments}" if arguments else name)
            if name == "show" and not self.run.results:
                self.run.results.append(None)

        return note


GOOD, BAD = RowResult(0, 2, [Completion([5, 6], "eos"), Completion([7], "eos")]), RowResult(1, None, error="too long")


def test_every_row_is_counted_and_shown() -> None:
    run = Run(GOOD, BAD)
    consumer = Consumer(run, Shown(run), "record")  # type: ignore[arg-type]
    with consumer as rows:
        assert list(rows) == [GOOD, BAD]
    assert run.calls == ["start", "finished(3, False)", "show", "finished(0, True)", "show", "stop", "close"]
    assert consumer.left == []


@pytest.mark.parametrize("on_error", ["record", "raise"])
def test_what_was_not_taken_is_kept(on_error: Any) -> None:
    run = Run(GOOD, BAD)
    consumer = Consumer(run, Shown(run), on_error)  # type: ignore[arg-type]
    with consumer:
        pass
    assert consumer.left == ([GOOD, BAD] if on_error == "record" else [GOOD])


def test_the_first_bad_row_is_raised() -> None:
    run = Run(BAD, GOOD)
    consumer = Consumer(run, Shown(run), "raise", " of split 'a'")  # type: ignore[arg-type]
    with pytest.raises(DatasetRowError, match="row 1 of split 'a': too long") as raised, consumer as rows:
        next(iter(rows))
    assert raised.value.index == 1 and consumer.left == [GOOD]
    assert run.calls == ["start", "stop", "close"]
