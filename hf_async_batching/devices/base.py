"""The device protocol: all that the pipeline asks of a CUDA device, of the CPU, or of the simulation.

Work is enqueued on named streams; within a stream it runs in order, between streams only events order it. The
pipeline names every wait with a `Guard`, so that the simulation can leave one out and show what breaks.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Protocol

import torch

Kernel = Callable[[], None]


class Stream(enum.Enum):
    """The queues of a device. `CALLER` stands for whatever the caller's thread had enqueued."""

    H2D = "h2d"
    COMPUTE = "compute"
    D2H = "d2h"
    CALLER = "caller"


class Guard(enum.Enum):
    """Every wait of the pipeline: who waits, for which event, and what would break without it."""

    HOST_INPUT_FREE = "host waits for h2d_done[slot]: the pinned input buffer is still being copied out"
    STAGING_FREE = "h2d waits for compute_done[slot]: the device staging buffer is still being read"
    INPUT_READY = "compute waits for h2d_done[n]: the step's inputs have not arrived"
    OUTPUT_FREE = "compute waits for d2h_done[slot]: the device output buffer is still being copied out"
    OUTPUT_READY = "d2h waits for compute_done[n]: the tokens have not been sampled"
    RESULT_READY = "host waits for d2h_done[n]: the tokens have not arrived in host memory"
    BUFFERS_READY = "h2d waits for the caller's stream: the staging buffers are still being zeroed"
    CALLER_WORK = "compute waits for the caller's stream: weights or tables are still being written"


class Event(Protocol):
    """A point in a stream. Opaque outside the device that recorded it."""


class Graph(Protocol):
    """Captured work that can be enqueued again at the cost of one launch."""

    def replay(self) -> None:
        """Run the captured work, inside a kernel that is launched on the stream it was captured on."""


class Device(Protocol):
    """Streams, events and memory of one device.

    Attributes:
        torch_device: Where its tensors live.
        supports_graphs: Whether `capture` works.
        runs_inline: Whether work runs while it is being enqueued, in the calling thread.
    """

    torch_device: torch.device
    supports_graphs: bool
    runs_inline: bool

    def host_buffer(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeroed host memory of `size` elements that copies can run from and to asynchronously (pinned on CUDA)."""

    def device_buffer(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeroed device memory of `size` elements; the zeroing is enqueued on the caller's stream."""

    def copy(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue a copy between host and device memory."""

    def launch(self, stream: Stream, kernel: Kernel) -> None:
        """Enqueue work: `kernel` is called at once with `stream` current (CUDA, CPU) or later (simulation)."""

    def record(self, stream: Stream) -> Any:
        """Enqueue an event behind everything that `stream` holds so far."""

    def wait(self, stream: Stream, event: Any, guard: Guard) -> None:
        """Make everything that `stream` gets from now on run after `event`. None is an event long past."""

    def synchronize(self, event: Any, guard: Guard) -> None:
        """Block the calling thread, asleep, until `event` has happened. None is an event long past."""

    def time_of(self, event: Any) -> float:
        """When a completed event happened, in seconds of `time.perf_counter`."""

    def capture(self, work: Kernel) -> Graph:
        """Capture `work` on the compute stream without running it. Only where `supports_graphs`."""

    def graph_bytes(self) -> int:
        """Memory that captured graphs hold, in bytes."""

    def close(self) -> None:
        """Wait for all work, then give back what the device holds for the engine."""
