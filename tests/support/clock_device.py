"""An engine in a time of its own: steps take as long as a test says, and what the host waits for passes at once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_async_batching.core.plan import Plan
from hf_async_batching.devices.base import Stream
from hf_async_batching.devices.cpu import CpuDevice
from support.toy_engine import VOCAB, ToyEngine

PLANNING = 0.001


class ClockDevice(CpuDevice):
    """Computes at once, and says that it took `seconds(plan)`, one step after the other.

    Attributes:
        now: The host's time.
        gaps: Seconds in which the device had nothing to do between two steps.
    """

    runs_inline = False

    def __init__(self, seconds: Callable[[Plan], float]) -> None:
        super().__init__()
        self.now, self.gaps = 100.0, list[float]()
        self._seconds, self._free, self._plan = seconds, 0.0, Plan(0, (), ())

    def planned(self, plan: Plan) -> None:
        self._plan = plan
        self.now += PLANNING

    def launch(self, stream: Stream, kernel: Callable[[], None]) -> None:
        kernel()
        if stream is Stream.COMPUTE:
            if self._free and self.now > self._free:
                self.gaps.append(self.now - self._free)
            self._free = max(self._free, self.now) + self._seconds(self._plan)

    def record(self, stream: Stream) -> Any:
        return max(self.now, self._free) if stream in (Stream.COMPUTE, Stream.D2H) else self.now

    def synchronize(self, event: Any, guard: Any) -> None:
        if event is not None:
            self.now = max(self.now, event)

    def time_of(self, event: Any) -> float:
        return float(event)


def timed_engine(
    depth: int, seconds: Callable[[Plan], float], monkeypatch: pytest.MonkeyPatch, draft_rows: int = 0
) -> tuple[ToyEngine, ClockDevice]:
    """An engine whose model always says 3, on a `ClockDevice`; `planned` is called for each of its plans."""
    device = ClockDevice(seconds)
    toy = ToyEngine(depth, 0, device=device, max_rows=4, num_pages=400, max_batch_tokens=9, draft_rows=draft_rows)

    def forward(inputs: Any) -> torch.Tensor:
        logits = torch.zeros(len(inputs.context.rows if inputs.sample_index is None else inputs.sample_index), VOCAB)
        logits[:, 3] = 1
        return logits

    plan = toy.engine.scheduler.plan

    def planned() -> Plan | None:
        made = plan()
        if made is not None:
            device.planned(made)
        return made

    toy.runner._forward = forward
    monkeypatch.setattr(toy.engine.scheduler, "plan", planned)
    for module in ("engine.engine", "runner.pipeline"):
        monkeypatch.setattr(f"hf_async_batching.{module}.time", SimpleNamespace(perf_counter=lambda: device.now))
    return toy, device
