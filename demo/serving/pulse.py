"""Samples the engine's figures once for all pages, and reads its last steps."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .backend import STAGES, Backend
from .serving import Serving

if TYPE_CHECKING:
    from hf_async_batching import Stats
    from hf_async_batching.core.timeline import Span, StepRecord

HISTORY_SECONDS = 60
SHOWN_STEPS = 24
_SAMPLE_SECONDS = 0.25
# Requests end rarely, so their rate is taken over a longer time than the others.
_REQUEST_SECONDS = 10.0
_WINDOW_SECONDS = 2.0


class _Point(NamedTuple):
    at: float
    speed: float
    running: int
    waiting: int
    finished: int


class Pulse:
    """Samples the engine a few times a second at most, however many pages are open, and remembers the last minute.

    Its methods may be called from any thread.
    """

    def __init__(self, backend: Backend, clock: Callable[[], float] = time.perf_counter) -> None:
        self._backend = backend
        self._clock = clock
        self._lock = threading.Lock()
        self._history: deque[_Point] = deque()
        self._figures: dict[str, Any] = {}
        self._steps: dict[str, Any] = {}
        self._taken = float("-inf")

    def read(self, since: float = float("-inf")) -> dict[str, Any]:
        """Return everything that a page draws.

        Args:
            since: The `now` of the page's last read; `history` holds only later points.

        Returns:
            now: Seconds, of the server's own clock.
            stage: The loading stage: its number, the number of stages, its text, whether it failed.
            facts: (name, value) pairs; a fact without a name is a sentence.
            figures: See `figures_of`; empty while loading.
            history: (seconds, tokens/s, running, waiting) of the last minute.
            steps: See `drawn_steps`.
        """
        with self._lock:
            now, serving = self._clock(), self._backend.serving
            if serving is not None and now - self._taken >= _SAMPLE_SECONDS:
                self._sample(serving, now)
            stage = self._backend.stage
            return {
                "now": now,
                "stage": [stage.number, STAGES, stage.text, stage.failed],
                "facts": serving.facts() if serving is not None else [],
                "figures": self._figures,
                "history": [point[:4] for point in self._history if point.at > since],
                "steps": self._steps,
            }

    def _sample(self, serving: Serving, now: float) -> None:
        self._taken = now
        stats = serving.manager.stats()
        while self._history and self._history[0].at < now - HISTORY_SECONDS:
            self._history.popleft()
        records = serving.manager.timeline().steps
        figures = figures_of(stats, serving, records, now)
        running, waiting = figures["running"], figures["waiting"]
        self._history.append(_Point(now, stats.tokens_per_second, running, waiting, stats.finished))
        self._figures = figures | {"requests_per_second": self._requests_per_second()}
        self._steps = drawn_steps(records[-SHOWN_STEPS:])

    def _requests_per_second(self) -> float:
        newest = self._history[-1]
        oldest = next(point for point in self._history if point.at >= newest.at - _REQUEST_SECONDS)
        ended = newest.finished - oldest.finished
        # A restarted engine counts from zero.
        return round(ended / (newest.at - oldest.at), 2) if newest.at > oldest.at and ended >= 0 else 0.0


def figures_of(stats: Stats, serving: Serving, records: Sequence[StepRecord], now: float) -> dict[str, Any]:
    """Return the present figures; rates are of the last two seconds, percentages go from 0 to 100.

    `mbu` is the memory bandwidth utilization: the bytes that the steps had to read (weights and live keys and values,
    once per step), divided by the time and by the copy bandwidth that was measured when the page started.
    """
    recent = [record for record in records if record.compute[1] >= now - _WINDOW_SECONDS]
    traffic, mbu = serving.traffic, 0.0
    if recent and traffic is not None:
        elapsed = now - max(now - _WINDOW_SECONDS, recent[0].compute[0])
        mbu = 100 * traffic.of_steps(recent) / elapsed / serving.machine.copy_bandwidth
    assembly = serving.manager.assembly
    waiting, entered = serving.roster.waiting()
    looked_up = stats.prefix_query_tokens
    return {
        "tokens_per_second": round(stats.tokens_per_second, 1),
        # A request that has a row but has not begun counts as waiting, as on the wall.
        "running": max(0, min(stats.running, stats.running + stats.waiting - entered)),
        "waiting": waiting,
        "rows": assembly.config.max_rows if assembly is not None else 0,
        "busy": round(100 * stats.busy_fraction, 1),
        "busy_of": "GPU" if serving.on_gpu else "CPU",
        "mbu": round(mbu, 1),
        "ms_per_step": round(stats.ms_per_step, 2),
        "host_ms_per_step": round(stats.host_ms_per_step, 2),
        "pages": stats.pages_in_use,
        "pages_total": stats.pages_total,
        "prefix_hits": round(100 * stats.prefix_hit_tokens / looked_up, 1) if looked_up else 0.0,
        "depth": stats.depth,
    }


def drawn_steps(records: Sequence[StepRecord]) -> dict[str, Any]:
    """Return steps as the page draws them: times in whole microseconds since the first step.

    Returns:
        steps: Per step its number, the rows that decoded, prompt tokens, tokens sampled, and then (start, end) of
            plan, settle, h2d, compute and d2h; None without a copy.
        busy: Percentage of the time in which a step was computed.
        ms: Milliseconds per step.
    """
    if not records:
        return {"steps": [], "busy": 0.0, "ms": 0.0}
    origin = min(record.plan[0] for record in records)

    def span(times: Span | None) -> tuple[int, int] | None:
        return None if times is None else (round(1e6 * (times[0] - origin)), round(1e6 * (times[1] - origin)))

    seconds = records[-1].compute[1] - records[0].compute[0]
    busy = sum(record.compute[1] - record.compute[0] for record in records)
    return {
        "steps": [
            [r.step, r.decode_rows, r.prompt_tokens, r.tokens]
            + [span(times) for times in (r.plan, r.settle, r.h2d, r.compute, r.d2h)]
            for r in records
        ],
        "busy": round(100 * busy / seconds, 1) if seconds else 0.0,
        "ms": round(1e3 * seconds / len(records), 3),
    }
