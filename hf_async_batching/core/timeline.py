"""The last steps of an engine, and what follows from their times."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import Any

from hf_async_batching.core.step_record import Span, StepRecord
from hf_async_batching.core.timeline_picture import Panel, draw

_SHOWN = 16

__all__ = ["Span", "StepRecord", "Timeline", "records_after"]


@dataclass(frozen=True, slots=True, repr=False)
class Timeline:
    """The last steps of an engine, oldest first. A notebook draws some of them.

    Attributes:
        steps: The records.
        device_name: For the trace: "CUDA" or "CPU".
    """

    steps: tuple[StepRecord, ...]
    device_name: str = "device"

    @property
    def seconds(self) -> float:
        """From the start of the first step's compute to the end of the last one's."""
        return self.steps[-1].compute[1] - self.steps[0].compute[0] if self.steps else 0.0

    @property
    def busy_fraction(self) -> float:
        """Share of `seconds` in which a step was being computed, 0 to 1."""
        return _total(record.compute for record in self.steps) / self.seconds if self.seconds else 0.0

    @property
    def ms_per_step(self) -> float:
        """Mean time per step, idle gaps included, in milliseconds."""
        return 1e3 * self.seconds / len(self.steps) if self.steps else 0.0

    @property
    def host_ms_per_step(self) -> float:
        """Mean host time per step (planning, launching, settling; no waiting), in milliseconds."""
        if not self.steps:
            return 0.0
        return 1e3 * _total(span for r in self.steps for span in (r.plan, r.settle)) / len(self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens over `seconds`."""
        return sum(record.tokens for record in self.steps) / self.seconds if self.seconds else 0.0

    def __repr__(self) -> str:
        count = len(self.steps)
        if not count:
            return f"Timeline({self.device_name}, no steps)"
        return (
            f"Timeline({self.device_name}, {count} step{'' if count == 1 else 's'}, {self.seconds:.3g} s, "
            f"device busy {100 * self.busy_fraction:.1f} %, {self.ms_per_step:.2f} ms/step, host "
            f"{self.host_ms_per_step:.2f} ms/step, {self.tokens_per_second:,.0f} tok/s)"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the figures, and a drawing of a few steps in the middle."""
        shown = self.steps[max(0, len(self.steps) // 2 - _SHOWN // 2) :][:_SHOWN]
        picture = draw([Panel(self.device_name, shown)]) if len(shown) > 1 else ""
        return f"<div>{escape(repr(self))}</div>{picture}"

    def to_chrome_trace(self) -> dict[str, Any]:
        """The steps in the Trace Event Format, which Perfetto and chrome://tracing open."""
        lanes = ("host", "h2d", "compute", "d2h")
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": f"hf_async_batching ({self.device_name})"}}
        ]
        events += [
            {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": lane}}
            for tid, lane in enumerate(lanes)
        ]
        origin = min((record.plan[0] for record in self.steps), default=0.0)
        for record in self.steps:
            spans = (
                ("host", "plan and launch", record.plan),
                ("host", "settle", record.settle),
                ("h2d", "inputs", record.h2d),
                ("compute", "prefill + decode" if record.prompt_tokens else "decode", record.compute),
                ("d2h", "tokens", record.d2h),
            )
            args = {
                "step": record.step,
                "decode_rows": record.decode_rows,
                "prompt_tokens": record.prompt_tokens,
                "tokens": record.tokens,
            }
            events += [
                {
                    "ph": "X",
                    "pid": 1,
                    "tid": lanes.index(lane),
                    "name": f"{name} {record.step}",
                    "ts": (span[0] - origin) * 1e6,
                    "dur": (span[1] - span[0]) * 1e6,
                    "args": args,
                }
                for lane, name, span in spans
                if span is not None
            ]
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as JSON to `path`."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_chrome_trace(), file)


def records_after(records: Sequence[StepRecord], step: int) -> tuple[StepRecord, ...]:
    """The records, oldest first, with a number above `step`. Its cost depends only on the length of the result."""
    count = 0
    for record in reversed(records):
        if record.step <= step:
            break
        count += 1
    return tuple(islice(reversed(records), count))[::-1]


def _total(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)
