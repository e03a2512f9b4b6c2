"""When each step was planned, copied, computed and collected, and figures computed from these times."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

Span = tuple[float, float]


class StepRecord(NamedTuple):
    """The life of one step; times in seconds of `time.perf_counter`.

    Attributes:
        step: Number of the step.
        decode_rows: Rows that decoded a token.
        prompt_tokens: Prompt tokens computed.
        tokens: Tokens sampled.
        context_tokens: Tokens whose keys and values the step's attention reads, including those that it writes itself.
        plan: Host: planning and launching.
        settle: Host: reading the result and handing tokens on.
        compute: Device: from the step's first kernel to its last.
        h2d: Copy to the device; None if nothing was sent.
        d2h: Copy from the device; None if nothing was sampled.
    """

    step: int
    decode_rows: int
    prompt_tokens: int
    tokens: int
    context_tokens: int
    plan: Span
    settle: Span
    compute: Span
    h2d: Span | None
    d2h: Span | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """The last steps of an engine, oldest first.

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
