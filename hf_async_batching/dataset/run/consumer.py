"""The caller's side of a run: takes finished rows, shows progress, and ends the run in every case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from queue import Empty
from types import TracebackType

from hf_async_batching.dataset.rows.row import OnError, RowResult
from hf_async_batching.dataset.run.batch_run import BatchRun
from hf_async_batching.dataset.run.progress import SECONDS, Progress
from hf_async_batching.errors import DatasetRowError


class Consumer:
    """Iterates over the finished rows of a run, in the order in which they finish.

    It is a context manager; leaving it ends the run.

    Args:
        run: The run, which is not started yet.
        progress: Counts every row.
        on_error: "raise" raises at the first failed row; "record" yields failed rows, too.
        where: Name of the split, as a part of a message.

    Attributes:
        left: Finished rows that were not taken when the run ended.
    """

    def __init__(self, run: BatchRun, progress: Progress, on_error: OnError, where: str = "") -> None:
        self._run = run
        self._progress = progress
        self._on_error = on_error
        self._where = where
        self.left: list[RowResult] = []

    def __enter__(self) -> Consumer:
        self._run.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.left = [row for row in self._run.stop() if row.error is None or self._on_error == "record"]
        self._progress.close()

    def __iter__(self) -> Iterator[RowResult]:
        while True:
            try:
                result = self._run.result(timeout=SECONDS)
            except Empty:
                self._progress.show()
                continue
            if result is None:
                return
            if result.error is not None and self._on_error == "raise":
                raise DatasetRowError(
                    f"row {result.index}{self._where}: {result.error} (on_error='record' keeps the error in a column "
                    "and goes on)",
                    result.index,
                )
            self._progress.finished(result.num_tokens, result.error is not None)
            yield result
            self._progress.show()


def in_order(results: Iterable[RowResult], release: Callable[[int], object]) -> Iterator[RowResult]:
    """Yield rows in the order of their indices, which count from 0 without a gap. Each row is released after use."""
    following = 0
    early: dict[int, RowResult] = {}
    for result in results:
        early[result.index] = result
        while following in early:
            yield early.pop(following)
            release(following)
            following += 1
