"""A CPU device of a rank whose captures fail as a test likes."""

from __future__ import annotations

from collections.abc import Callable

from hf_async_batching.devices.base import Graph, Kernel
from hf_async_batching.devices.cpu import CpuDevice


class RankDevice(CpuDevice):
    """The CPU, with graphs that call what they captured.

    Args:
        fails: Whether a capture fails, by its number from 0 on.
    """

    supports_graphs = True

    def __init__(self, fails: Callable[[int], bool] = lambda number: False) -> None:
        super().__init__()
        self._fails = fails
        self.captures = self.failures = 0
        self.replaying = False

    def capture(self, work: Kernel) -> Graph:
        self.captures += 1
        if self._fails(self.captures - 1):
            self.failures += 1
            raise RuntimeError("cannot be captured")
        return _Graph(self, work)


class _Graph:
    def __init__(self, device: RankDevice, work: Kernel) -> None:
        self._device, self._work = device, work

    def replay(self) -> None:
        self._device.replaying = True
        try:
            self._work()
        finally:
            self._device.replaying = False
