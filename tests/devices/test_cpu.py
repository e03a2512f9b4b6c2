"""The CPU as a device: everything at once, in order."""

from __future__ import annotations

import time

import pytest
import torch

from hf_async_batching.devices.base import Guard, Stream
from hf_async_batching.devices.cpu import CpuDevice
from hf_async_batching.devices.select import make_device


def test_work_runs_when_it_is_enqueued() -> None:
    device = CpuDevice()
    ran: list[str] = []
    device.launch(Stream.COMPUTE, lambda: ran.append("kernel"))
    assert ran == ["kernel"]
    source, destination = torch.tensor([5]), torch.tensor([0])
    device.copy(Stream.H2D, destination, source)
    source.fill_(6)
    assert int(destination) == 5
    assert device.runs_inline
    device.close()


def test_events_are_the_time_at_which_they_were_recorded() -> None:
    device = CpuDevice()
    before = time.perf_counter()
    first = device.record(Stream.COMPUTE)
    device.launch(Stream.COMPUTE, lambda: time.sleep(0.002))
    second = device.record(Stream.D2H)
    assert before <= device.time_of(first) <= device.time_of(second) - 0.002
    assert device.time_of(second) <= time.perf_counter()


def test_waits_return_at_once() -> None:
    device = CpuDevice()
    event = device.record(Stream.H2D)
    for guard in Guard:
        device.wait(Stream.COMPUTE, event, guard)
        device.synchronize(event, guard)
        device.wait(Stream.COMPUTE, None, guard)
        device.synchronize(None, guard)


def test_host_buffers_are_zeroed() -> None:
    device = CpuDevice()
    buffer = device.host_buffer(7, torch.int32)
    assert buffer.tolist() == [0] * 7
    assert buffer.dtype == torch.int32
    assert device.torch_device == torch.device("cpu")


def test_it_captures_no_graphs() -> None:
    device = CpuDevice()
    assert not device.supports_graphs
    assert device.graph_bytes() == 0
    with pytest.raises(NotImplementedError):
        device.capture(lambda: None)


def test_make_device() -> None:
    assert isinstance(make_device(torch.device("cpu")), CpuDevice)
    with pytest.raises(NotImplementedError, match="'meta' devices are not served"):
        make_device(torch.device("meta"))
