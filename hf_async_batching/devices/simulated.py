"""A device whose three streams are executed in any order that the recorded events allow, chosen by an adversary.

Nothing runs when it is enqueued. A seeded adversary decides, at every call, which streams advance and by how much;
it knows each stream's order and the events, and no more. Code that is right only because copies are usually fast, or
because a buffer is usually read before it is written again, gives wrong tokens for some seed.

Copies read their source when they are executed, not when they are enqueued: a host buffer that is written again too
early corrupts the copy, as it would on hardware.
"""

from __future__ import annotations

import random
import time
from bisect import bisect
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from hf_async_batching.devices.base import Graph, Guard, Kernel, Stream


class SimulatedEvent:
    """A point in a stream; `happened` turns true when the stream gets there."""

    __slots__ = ("happened", "time")

    def __init__(self) -> None:
        self.happened = False
        self.time = 0.0


class _Operation(NamedTuple):
    run: Callable[[], object]
    after: SimulatedEvent | None


class SimulatedDevice:
    """Streams as queues.

    Args:
        seed: The adversary's seed. It also decides how fast each stream tends to be.
        without: A wait to leave out, which shows that it is needed.
    """

    supports_graphs = False
    runs_inline = False

    def __init__(self, seed: int, without: Guard | None = None) -> None:
        self.torch_device = torch.device("cpu")
        self.without = without
        self._random = random.Random(seed)
        self._queues: dict[Stream, deque[_Operation]] = {stream: deque() for stream in Stream}
        self._weighted = [(queue, self._random.choice((0.02, 0.3, 1.0))) for queue in self._queues.values()]
        self._eagerness = self._random.choice((0.0, 0.3, 0.8))

    def host_buffer(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device="cpu")

    def device_buffer(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.full((size,), self._random.randrange(100), dtype=dtype, device="cpu")
        self._enqueue(Stream.CALLER, buffer.zero_)
        return buffer

    def copy(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._enqueue(stream, lambda: destination.copy_(source))

    def launch(self, stream: Stream, kernel: Kernel) -> None:
        self._enqueue(stream, kernel)

    def record(self, stream: Stream) -> SimulatedEvent:
        event = SimulatedEvent()

        def happen() -> None:
            event.happened = True
            event.time = time.perf_counter()

        self._enqueue(stream, happen)
        return event

    def wait(self, stream: Stream, event: SimulatedEvent | None, guard: Guard) -> None:
        if event is not None and guard is not self.without:
            self._enqueue(stream, lambda: None, event)

    def synchronize(self, event: SimulatedEvent | None, guard: Guard) -> None:
        if event is not None and guard is not self.without:
            while not event.happened:
                self._advance()
        self._interlude()

    def time_of(self, event: SimulatedEvent) -> float:
        return event.time

    def capture(self, work: Kernel) -> Graph:
        raise NotImplementedError("the simulation captures no graphs")

    def graph_bytes(self) -> int:
        return 0

    def close(self) -> None:
        """Run everything that is still enqueued."""
        while any(self._queues.values()):
            self._advance()

    def _enqueue(self, stream: Stream, run: Callable[[], object], after: SimulatedEvent | None = None) -> None:
        self._queues[stream].append(_Operation(run, after))
        self._interlude()

    def _interlude(self) -> None:
        """Let the device do, between two calls of the host, as much as the adversary likes."""
        while self._random.random() < self._eagerness:
            if not self._advance(idle_ok=True):
                return

    def _advance(self, idle_ok: bool = False) -> bool:
        ready, bounds, total = [], [], 0.0
        for queue, weight in self._weighted:
            if queue and ((event := queue[0].after) is None or event.happened):
                total += weight
                ready.append(queue)
                bounds.append(total)
        if not ready:
            if idle_ok:
                return False
            raise RuntimeError("deadlock: every stream waits for an event that nothing left to run can record")
        queue = ready[bisect(bounds, self._random.random() * total, 0, len(ready) - 1)]
        queue.popleft().run()
        return True
