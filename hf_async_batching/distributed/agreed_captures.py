"""Captures that succeed on all ranks of a model, or on none.

NCCL requires that a collective is launched from a graph on every rank or on none (its user guide, "Using NCCL with
CUDA Graphs"). Also, a rank that has given up capturing no longer pads its decode steps, so its collectives would have
other sizes than those of the other ranks.
"""

from __future__ import annotations

from typing import Any, cast

from hf_async_batching.devices.base import Device, Graph, Kernel
from hf_async_batching.distributed.rank_group import RankGroup


def with_agreed_captures(device: Device, group: RankGroup) -> Device:
    """Wrap a rank's device so that a capture fails on all ranks if it fails on one.

    Args:
        device: This rank's device.
        group: The ranks; all of them capture the same steps in the same order.
    """
    return cast(Device, _AgreedCaptures(device, group))


class _AgreedCaptures:
    def __init__(self, device: Device, group: RankGroup) -> None:
        self._device = device
        self._group = group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def capture(self, work: Kernel) -> Graph:
        succeeded = 0
        try:
            graph = self._device.capture(work)
            succeeded = 1
        finally:
            # Also after a failure, because the other ranks wait for the answer.
            everywhere = self._group.least(succeeded)
        if not everywhere:
            raise RuntimeError("another rank could not capture the step")
        return graph
