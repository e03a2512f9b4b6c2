"""The simulated device: an adversary who may do what streams and events allow, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from hf_async_batching.devices.base import Guard, Stream
from hf_async_batching.devices.simulated import SimulatedDevice, SimulatedEvent

SEEDS = range(60)
T = TypeVar("T")


def adder(ran: list[T], what: T) -> Callable[[], None]:
    """Work that leaves a trace."""
    return lambda: ran.append(what)


@pytest.mark.parametrize("stream", list(Stream))
def test_a_stream_keeps_its_order(stream: Stream) -> None:
    for seed in SEEDS:
        device = SimulatedDevice(seed)
        ran: list[tuple[Stream, int]] = []
        for i, one in itertools.product(range(5), Stream):
            device.launch(one, adder(ran, (one, i)))
        device.close()
        assert [i for one, i in ran if one is stream] == list(range(5))


def test_streams_run_in_many_orders() -> None:
    orders = set()
    for seed in SEEDS:
        device = SimulatedDevice(seed)
        ran: list[str] = []
        for stream in (Stream.H2D, Stream.COMPUTE, Stream.D2H):
            device.launch(stream, adder(ran, stream.name))
        device.close()
        orders.add(tuple(ran))
    assert len(orders) == 6


def test_the_same_seed_is_the_same_adversary() -> None:
    def run(seed: int) -> list[int]:
        device = SimulatedDevice(seed)
        ran: list[int] = []
        for i in range(12):
            device.launch(list(Stream)[i % 4], adder(ran, i))
        device.close()
        return ran

    assert all(run(seed) == run(seed) for seed in SEEDS)


def waits(seed: int, without: Guard | None, guard: Guard) -> bool:
    """Whether COMPUTE ran after H2D, for which it waits under the name `guard`."""
    device = SimulatedDevice(seed, without)
    ran: list[str] = []
    device.launch(Stream.H2D, adder(ran, "copy"))
    event = device.record(Stream.H2D)
    device.wait(Stream.COMPUTE, event, guard)
    device.launch(Stream.COMPUTE, adder(ran, "kernel"))
    device.close()
    assert sorted(ran) == ["copy", "kernel"]
    return ran == ["copy", "kernel"]


def test_waits_are_respected_by_every_adversary() -> None:
    assert all(waits(seed, None, Guard.INPUT_READY) for seed in SEEDS)


@pytest.mark.parametrize("left_out", list(Guard))
def test_without_leaves_out_exactly_one_wait(left_out: Guard) -> None:
    for guard in Guard:
        kept = [waits(seed, left_out, guard) for seed in SEEDS]
        assert all(kept) == (guard is not left_out)


def test_a_wait_holds_back_only_what_comes_after_it() -> None:
    for seed in SEEDS:
        device = SimulatedDevice(seed)
        ran: list[str] = []
        never = SimulatedEvent()
        device.launch(Stream.COMPUTE, adder(ran, "before"))
        device.wait(Stream.COMPUTE, never, Guard.INPUT_READY)
        device.launch(Stream.COMPUTE, adder(ran, "after"))
        device.launch(Stream.D2H, adder(ran, "other"))
        with pytest.raises(RuntimeError, match="deadlock"):
            device.close()
        assert sorted(ran) == ["before", "other"]


def test_an_event_long_past_holds_nobody_back() -> None:
    device = SimulatedDevice(0)
    device.wait(Stream.COMPUTE, None, Guard.STAGING_FREE)
    device.synchronize(None, Guard.HOST_INPUT_FREE)
    device.close()


@pytest.mark.parametrize("without", [None, Guard.RESULT_READY])
def test_synchronize_returns_after_the_event(without: Guard | None) -> None:
    arrived = []
    for seed in SEEDS:
        device = SimulatedDevice(seed, without)
        ran: list[int] = []
        for i in range(4):
            device.launch(Stream.D2H, adder(ran, i))
        event = device.record(Stream.D2H)
        device.synchronize(event, Guard.RESULT_READY)
        arrived.append(event.happened and len(ran) == 4)
        device.close()
    assert all(arrived) == (without is None)


def test_a_deadlock_is_reported() -> None:
    device = SimulatedDevice(3)
    device.wait(Stream.H2D, SimulatedEvent(), Guard.STAGING_FREE)
    event = device.record(Stream.H2D)
    with pytest.raises(RuntimeError, match="deadlock"):
        device.synchronize(event, Guard.HOST_INPUT_FREE)


def test_copies_read_their_source_when_they_run() -> None:
    seen = set()
    for seed in SEEDS:
        device = SimulatedDevice(seed)
        source, destination = device.host_buffer(1, torch.int32), torch.zeros(1, dtype=torch.int32)
        source.fill_(1)
        device.copy(Stream.H2D, destination, source)
        event = device.record(Stream.H2D)
        source.fill_(2)  # too early: nobody has waited for the copy
        device.synchronize(event, Guard.HOST_INPUT_FREE)
        seen.add(int(destination))
        source.fill_(3)
        device.close()
        assert int(destination) in (1, 2), "the copy ran after its event"
    assert seen == {1, 2}


def test_events_know_their_time() -> None:
    for seed in range(10):
        device = SimulatedDevice(seed)
        first = device.record(Stream.COMPUTE)
        second = device.record(Stream.COMPUTE)
        device.synchronize(second, Guard.RESULT_READY)
        assert 0 < device.time_of(first) <= device.time_of(second)


def test_what_it_cannot_do() -> None:
    device = SimulatedDevice(0)
    assert not device.supports_graphs
    assert not device.runs_inline
    assert device.graph_bytes() == 0
    with pytest.raises(NotImplementedError):
        device.capture(lambda: None)
