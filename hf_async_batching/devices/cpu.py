"""The CPU as a device: the same order of events, executed at once in the calling thread."""

from __future__ import annotations

import time

import torch

from hf_async_batching.devices.base import Graph, Guard, Kernel, Stream


class CpuDevice:
    """Runs everything immediately; an event is the time at which it was recorded."""

    supports_graphs = False
    runs_inline = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def host_buffer(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device="cpu")

    def device_buffer(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device="cpu")

    def copy(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
        destination.copy_(source)

    def launch(self, stream: Stream, kernel: Kernel) -> None:
        kernel()

    def record(self, stream: Stream) -> float:
        return time.perf_counter()

    def wait(self, stream: Stream, event: float | None, guard: Guard) -> None:
        pass

    def synchronize(self, event: float | None, guard: Guard) -> None:
        pass

    def time_of(self, event: float) -> float:
        return event

    def capture(self, work: Kernel) -> Graph:
        raise NotImplementedError("the CPU captures no graphs")

    def graph_bytes(self) -> int:
        return 0

    def close(self) -> None:
        pass
