"""What the CUDA device does around a capture; the capture itself needs a GPU."""

from __future__ import annotations

import gc
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from hf_async_batching.devices import cuda
from hf_async_batching.devices.cuda import CudaDevice
from hf_async_batching.runtime.gc_pause import no_collections


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    for name in ("CUDAGraph", "graph_pool_handle", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: "a graph or a pool")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: nullcontext())
    device = CudaDevice.__new__(CudaDevice)
    device.torch_device = torch.device("cuda", 0)
    device._streams = defaultdict(str)  # type: ignore[assignment]
    device._pool, device._graph_bytes = None, 0
    return device


def test_nothing_is_collected_during_a_capture(device: CudaDevice) -> None:
    seen: list[bool] = []
    device.capture(lambda: seen.append(gc.isenabled()))
    assert seen == [False] and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        device.capture(lambda: 1 // 0 and None)  # type: ignore[func-returns-value]
    assert gc.isenabled()


def test_a_start_that_ends_while_a_capture_waits_or_runs(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever comes first and goes first, the collector is off for both and on in the end."""
    start = no_collections()
    seen: list[bool] = []

    def work() -> None:
        start.__exit__(None, None, None)
        seen.append(gc.isenabled())

    start.__enter__()
    device.capture(work)
    assert seen == [False] and gc.isenabled()

    other = no_collections()
    exclusive = cuda._exclusive

    @contextmanager
    def waits() -> Any:
        other.__exit__(None, None, None)
        with exclusive:
            yield

    other.__enter__()
    monkeypatch.setattr(cuda, "_exclusive", waits())
    device.capture(lambda: seen.append(gc.isenabled()))
    assert seen == [False, False] and gc.isenabled()
