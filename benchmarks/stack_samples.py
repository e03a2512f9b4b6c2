"""Samples the stacks of all threads. A start runs in several threads, and a call profiler slows them unevenly."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType, TracebackType

Stack = tuple[str, ...]


class StackSamples:
    """A context manager that samples the stacks of all threads.

    Args:
        interval: Seconds between two samples.

    Attributes:
        seconds: Seconds by thread (name and identity) and stack, with the outermost function first.
    """

    def __init__(self, interval: float = 0.005) -> None:
        self.seconds: Counter[Stack] = Counter()
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="samples", daemon=True)

    def __enter__(self) -> StackSamples:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        before = time.perf_counter()
        while not self._done.wait(self._interval):
            names = {thread.ident: f"{thread.name} ({thread.ident})" for thread in threading.enumerate()}
            now = time.perf_counter()
            for ident, frame in sys._current_frames().items():
                if ident != threading.get_ident():
                    self.seconds[(names.get(ident, "?"), *_functions(frame))] += now - before
            before = now

    def report(self, least: float = 0.05) -> str:
        """Return an indented tree of the functions that took at least `least` seconds."""
        totals: Counter[Stack] = Counter()
        for stack, seconds in self.seconds.items():
            for depth in range(1, len(stack) + 1):
                totals[stack[:depth]] += seconds
        lines: list[str] = []
        self._describe((), totals, least, lines)
        return "\n".join(lines)

    def _describe(self, above: Stack, totals: Counter[Stack], least: float, lines: list[str]) -> None:
        below = [stack for stack in totals if len(stack) == len(above) + 1 and stack[: len(above)] == above]
        for stack in sorted(below, key=lambda stack: -totals[stack]):
            if totals[stack] >= least:
                lines.append(f"{totals[stack]:7.2f} {'  ' * len(above)}{stack[-1]}")
                self._describe(stack, totals, least, lines)


def _functions(frame: FrameType | None) -> list[str]:
    found: list[str] = []
    while frame is not None:
        code = frame.f_code
        found.append(f"{Path(code.co_filename).parent.name}/{Path(code.co_filename).name}:{code.co_name}")
        frame = frame.f_back
    return found[::-1]
