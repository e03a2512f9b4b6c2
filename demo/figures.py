"""The strip of live figures: one shared sample a second, drawn as HTML."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_async_batching import GenerationManager, Stats

HISTORY_SECONDS = 60
# A little less than the page's timer, so that every tick of a single visitor finds a new sample.
_SAMPLE_SECONDS = 0.8
_GAP_SECONDS = 5.0


class Meter:
    """Samples the engine at most once a second, however many pages are open, and remembers the last minute."""

    def __init__(
        self, manager: GenerationManager, busy_label: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._manager = manager
        self._busy_label = busy_label
        self._clock = clock
        self._speeds: deque[tuple[float, float]] = deque()
        self._html = ""
        self._taken = float("-inf")

    def html(self) -> str:
        """Return the strip as HTML."""
        now = self._clock()
        if now - self._taken >= _SAMPLE_SECONDS:
            if now - self._taken > _GAP_SECONDS:
                self._speeds.clear()  # nobody was watching: the line would bridge what was never measured
            self._taken = now
            stats = self._manager.stats()
            self._speeds.append((now, stats.tokens_per_second))
            while self._speeds[0][0] < now - HISTORY_SECONDS:
                self._speeds.popleft()
            self._html = render(stats, self._busy_label, [(at - now, speed) for at, speed in self._speeds])
        return self._html


def render(stats: Stats, busy_label: str, speeds: Sequence[tuple[float, float]]) -> str:
    """Draw the figures. `speeds` holds (seconds relative to now, tokens/s) pairs, oldest first."""
    busy = min(max(stats.busy_fraction, 0.0), 1.0)
    used = stats.pages_in_use / stats.pages_total if stats.pages_total else 0.0
    total = f" / {stats.pages_total:,}" if stats.pages_total else ""
    cells = [
        _cell("Tokens per second", f"{stats.tokens_per_second:,.1f}", "", _sparkline(speeds), "wide"),
        _cell("Running", f"{stats.running:,}", ""),
        _cell("Waiting", f"{stats.waiting:,}", ""),
        _cell(busy_label, f"{100 * busy:.0f}", " %", _bar(busy)),
        _cell("KV pages in use", f"{stats.pages_in_use:,}", total, _bar(used)),
    ]
    return f'<dl class="strip" aria-label="Live figures of the engine">{"".join(cells)}</dl>'


def _cell(label: str, value: str, unit: str, picture: str = "", kind: str = "") -> str:
    small = f"<small>{escape(unit)}</small>" if unit else ""
    picture = f'<span class="picture" aria-hidden="true">{picture}</span>'
    return f'<div class="cell {kind}"><dt>{escape(label)}</dt><dd>{escape(value)}{small}{picture}</dd></div>'


def _bar(fraction: float) -> str:
    return f'<span class="bar"><span style="width:{100 * min(max(fraction, 0.0), 1.0):.1f}%"></span></span>'


def _sparkline(speeds: Sequence[tuple[float, float]]) -> str:
    top = max((speed for _, speed in speeds), default=0.0) or 1.0
    points = [(100 + 100 * at / HISTORY_SECONDS, 23 - 22 * speed / top) for at, speed in speeds]
    if not points:
        return ""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    area = f"{points[0][0]:.1f},24 {line} {points[-1][0]:.1f},24"
    return (
        '<svg viewBox="0 0 100 24" preserveAspectRatio="none" focusable="false">'
        f'<polygon points="{area}"/><polyline points="{line}" vector-effect="non-scaling-stroke"/></svg>'
    )
