"""A snapshot of an engine's state."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields

from hf_async_batching.core.timeline import Timeline, records_after
from hf_async_batching.engine.builder import EngineParts
from hf_async_batching.runtime.size_text import size_text

WINDOW_SECONDS = 2.0


@dataclass(frozen=True, slots=True, repr=False)
class Stats:
    """Current figures; rates cover the last two seconds.

    Attributes:
        running: Requests that hold a row.
        waiting: Requests that wait for a row.
        tokens_per_second: New tokens of all requests.
        busy_fraction: Share of the time in which the device computed a step, 0 to 1.
        ms_per_step: Mean time per step while there was work, in milliseconds.
        host_ms_per_step: Mean host time per step, in milliseconds.
        pages_in_use: KV pages held by requests, including retired ones. If layers with and without a window have
            separate pages, both kinds count.
        pages_total: KV pages that requests can own.
        rows_in_use: Rows held by requests, including retired ones.
        steps: Steps since the engine started.
        finished: Requests that have ended, for any reason, since the engine started.
        preemptions: Times that a request gave up its pages, since the engine started.
        prefix_query_tokens: Prompt tokens that were looked up in the prefix cache, since the engine started.
        prefix_hit_tokens: Prompt tokens whose pages were found and not computed again, since the engine started.
        prefix_pages: KV pages that the prefix cache keeps and no request holds; they count as free.
        drafted_tokens: Tokens that prompt lookup drafted, since the engine started.
        accepted_tokens: Drafted tokens that were accepted, since the engine started.
        depth: Steps in flight at once.
        page_size: Tokens per page.
        cache_bytes: Memory of the KV cache, in bytes.
        graphs: Number of captured CUDA graphs.
        graph_bytes: Memory of the captured graphs, in bytes.
    """

    running: int = 0
    waiting: int = 0
    tokens_per_second: float = 0.0
    busy_fraction: float = 0.0
    ms_per_step: float = 0.0
    host_ms_per_step: float = 0.0
    pages_in_use: int = 0
    pages_total: int = 0
    rows_in_use: int = 0
    steps: int = 0
    finished: int = 0
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_pages: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    depth: int = 0
    page_size: int = 0
    cache_bytes: int = 0
    graphs: int = 0
    graph_bytes: int = 0

    def in_words(self) -> str:
        """The figures that say most, for a manager's `repr`."""
        return (
            f"{self.running} running, {self.waiting} waiting, {self.tokens_per_second:,.0f} tok/s, "
            f"{self.pages_in_use:,} of {self.pages_total:,} pages, KV cache {size_text(self.cache_bytes)}"
        )

    def __repr__(self) -> str:
        figures = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return f"Stats({', '.join(f'{name}={_rounded(value)}' for name, value in figures)})"


def _rounded(value: float) -> str:
    """Four digits, and all digits before the point."""
    return str(value) if isinstance(value, int) else f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def read_stats(parts: EngineParts | None, inbox: int) -> Stats:
    """Figures of an engine; zeros for None. The engine keeps running, so figures may be one step apart."""
    if parts is None:
        return Stats()
    engine, scheduler = parts.engine, parts.engine.scheduler
    records = tuple(engine.records.copy())
    now = time.perf_counter()
    recent = Timeline(tuple(record for record in records if record.compute[1] >= now - WINDOW_SECONDS))
    # Rates cover a time window, so they fall to zero when work ends.
    elapsed = now - max(now - WINDOW_SECONDS, recent.steps[0].compute[0]) if recent.steps else WINDOW_SECONDS
    busy = sum(record.compute[1] - max(record.compute[0], now - WINDOW_SECONDS) for record in recent.steps)
    return Stats(
        running=scheduler.num_running,
        waiting=scheduler.num_waiting + inbox,
        tokens_per_second=sum(record.tokens for record in recent.steps) / elapsed,
        busy_fraction=min(1.0, busy / elapsed),
        ms_per_step=recent.ms_per_step,
        host_ms_per_step=recent.host_ms_per_step,
        pages_in_use=scheduler.pages.in_use,
        pages_total=scheduler.pages.size,
        rows_in_use=scheduler.rows.in_use,
        steps=records[-1].step + 1 if records else 0,
        finished=scheduler.finished,
        preemptions=scheduler.preemptions,
        prefix_query_tokens=scheduler.pages.prefixes.query_tokens,
        prefix_hit_tokens=scheduler.pages.prefixes.hit_tokens,
        prefix_pages=scheduler.pages.prefixes.num_unheld,
        drafted_tokens=scheduler.drafting.drafted,
        accepted_tokens=scheduler.drafting.accepted,
        depth=engine.depth,
        page_size=parts.config.page_size,
        cache_bytes=parts.cache.num_bytes,
        graphs=len(parts.runner.graphs.captured),
        graph_bytes=engine.device.graph_bytes(),
    )


def read_timeline(parts: EngineParts | None, after: int) -> Timeline:
    """The recorded steps of an engine with numbers above `after`; no steps for None."""
    if parts is None:
        return Timeline(())
    name = "CUDA" if parts.forward.device.type == "cuda" else "CPU"
    return Timeline(records_after(parts.engine.records.copy(), after), name)
