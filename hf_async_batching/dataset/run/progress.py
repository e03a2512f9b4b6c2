"""The progress of a run, for people and for programs."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_async_batching.manager import GenerationManager

logger = logging.getLogger(__name__)

SECONDS = 0.5
LOG_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class DatasetProgress:
    """The progress of a run.

    Attributes:
        split: Name of the split of a `DatasetDict`; empty otherwise.
        rows: Finished rows, with those of earlier runs.
        total: All rows; None for streams.
        resumed: Rows that earlier runs had finished.
        failed: Finished rows with an error.
        tokens: New tokens of this run's finished rows.
        tokens_per_second: New tokens of all requests of the engine, over the last two seconds.
        running: Requests that the engine computes.
        waiting: Requests that wait for a place.
        seconds: Seconds since the run began.
        remaining_seconds: An estimate of the remaining time; None if no estimate is possible.
    """

    split: str
    rows: int
    total: int | None
    resumed: int
    failed: int
    tokens: int
    tokens_per_second: float
    running: int
    waiting: int
    seconds: float
    remaining_seconds: float | None


class Progress:
    """Counts rows, draws a bar on a terminal or in a notebook, and calls back at most twice a second.

    Without a bar, it logs a line each 30 seconds.

    Args:
        manager: The manager whose figures are shown.
        total: Rows; None for streams.
        split: Name of the split of a `DatasetDict`.
        bar: Whether to draw a bar; None for a bar on a terminal (standard error) and in a notebook.
        callback: Called with a `DatasetProgress`, in the caller's thread.
    """

    def __init__(
        self,
        manager: GenerationManager,
        total: int | None,
        *,
        split: str = "",
        bar: bool | None = None,
        callback: Callable[[DatasetProgress], object] | None = None,
    ) -> None:
        self._manager = manager
        self._total = total
        self._split = split
        self._callback = callback
        self._rows = self._resumed = self._failed = self._tokens = 0
        self._began = self._last = time.perf_counter()
        self._bar: Any = None
        draws = bar if bar is not None else sys.stderr.isatty() or in_notebook()
        self._logs = bar is None and not draws
        self._logged = self._began
        if draws:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, desc=split or None, unit=" rows", dynamic_ncols=True)

    def resumed(self, rows: int) -> None:
        """Count rows that an earlier run has finished."""
        self._resumed += rows
        self._rows += rows
        if self._bar is not None:
            self._bar.initial += rows
            self._bar.update(rows)

    def finished(self, tokens: int, failed: bool) -> None:
        """Count a finished row."""
        self._rows += 1
        self._tokens += tokens
        self._failed += failed

    def show(self, *, at_once: bool = False) -> None:
        """Show the progress, if that is due."""
        now = time.perf_counter()
        if self._logs and now - self._logged >= LOG_SECONDS:
            self._logged = now
            logger.info("%s", describe(self.state()))
        if (self._bar is None and self._callback is None) or (now - self._last < SECONDS and not at_once):
            return
        self._last = now
        state = self.state()
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"{state.tokens_per_second:,.0f} tok/s, {state.running} running, {state.waiting} waiting"
                + (f", {state.failed} failed" if state.failed else ""),
                refresh=False,
            )
            self._bar.update(state.rows - self._bar.n)
            self._bar.refresh()
        if self._callback is not None:
            self._callback(state)

    def state(self) -> DatasetProgress:
        """Return the progress of the run."""
        stats = self._manager.stats()
        seconds = time.perf_counter() - self._began
        done = self._rows - self._resumed
        remaining = None
        if self._total is not None and done:
            remaining = seconds / done * (self._total - self._rows)
        return DatasetProgress(
            split=self._split,
            rows=self._rows,
            total=self._total,
            resumed=self._resumed,
            failed=self._failed,
            tokens=self._tokens,
            tokens_per_second=stats.tokens_per_second,
            running=stats.running,
            waiting=stats.waiting,
            seconds=seconds,
            remaining_seconds=remaining,
        )

    def close(self) -> None:
        """Show the last state, and end the bar."""
        self.show(at_once=True)
        if self._bar is not None:
            self._bar.close()


def describe(state: DatasetProgress) -> str:
    """Describe the progress of a run in one line."""
    total = "" if state.total is None else f" of {state.total:,}"
    parts = [
        f"{f'{state.split}: ' if state.split else ''}{state.rows:,}{total} rows",
        f"{state.tokens_per_second:,.0f} tok/s",
        f"{state.running} running",
        f"{state.waiting} waiting",
    ]
    if state.failed:
        parts.append(f"{state.failed} failed")
    if state.remaining_seconds is not None:
        minutes, seconds = divmod(round(state.remaining_seconds), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append(f"{hours}:{minutes:02}:{seconds:02} left")
    return ", ".join(parts)


def in_notebook() -> bool:
    """Whether this code runs in a notebook's kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ in ("ZMQInteractiveShell", "Shell")  # Jupyter's and Colab's
