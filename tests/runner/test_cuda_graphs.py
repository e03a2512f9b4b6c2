"""Which steps are captured, when, and for how long their graphs are kept; on a device whose graphs are calls."""

from __future__ import annotations

import logging

import pytest
from support.fake_graphs import RankDevice

from hf_async_batching.core.plan import Features
from hf_async_batching.core.step_layout import Padding
from hf_async_batching.runner import cuda_graphs
from hf_async_batching.runner.cuda_graphs import (
    DECODE_USES,
    FORWARD,
    MAX_FAILED_CAPTURES,
    PADDED_USES,
    Captured,
    GraphCache,
)

GREEDY = Features()
DECODE, PROMPTS = Captured(4, GREEDY), Captured(Padding(16, 8, 4), GREEDY)


class Step:
    """Counts how often it is run, by a graph or without."""

    runs = 0

    def __call__(self) -> None:
        self.runs += 1


def use(graphs: GraphCache, key: Captured, times: int) -> list[bool]:
    """Whether each run of a step replayed a graph; every run does the step's work once."""
    step, known = Step(), key in graphs.captured
    replayed = [graphs.run(key, step) for _ in range(times)]
    assert step.runs == (0 if known else times)
    return replayed


def uses_until(key: Captured, captures: int) -> int:
    """How often a step is used up to its `captures`-th attempt at a capture, where all earlier attempts fail."""
    return PADDED_USES * captures + 1 if isinstance(key.size, Padding) else DECODE_USES + captures


@pytest.mark.parametrize(("key", "uses"), [(DECODE, DECODE_USES), (PROMPTS, PADDED_USES)])
def test_a_step_is_captured_once_it_has_come_often_enough(key: Captured, uses: int) -> None:
    device = RankDevice()
    graphs = GraphCache(device, enabled=True)
    assert use(graphs, key, uses + 3) == [False] * uses + [True] * 3
    assert device.captures == 1
    assert list(graphs.captured) == [key]


def test_what_is_done_with_the_logits_tells_graphs_apart() -> None:
    device = RankDevice()
    graphs = GraphCache(device, enabled=True)
    keys = [DECODE, Captured(8, GREEDY), Captured(4, FORWARD), Captured(4, Features(sampling=True))]
    for key in keys:
        use(graphs, key, DECODE_USES + 1)
    assert list(graphs.captured) == keys
    assert device.captures == len(keys)


def test_nothing_is_captured_where_that_is_off() -> None:
    device = RankDevice()
    assert not any(use(GraphCache(device, enabled=False), DECODE, 9))
    assert device.captures == 0


def test_a_step_with_prompts_can_be_captured_next() -> None:
    graphs = GraphCache(RankDevice(), enabled=True)
    graphs.capture_next(PROMPTS)
    assert use(graphs, PROMPTS, 1) == [True]


@pytest.mark.parametrize(("key", "enabled"), [(DECODE, False), (PROMPTS, True)])
def test_captures_that_fail_in_a_row_are_given_up(
    key: Captured, enabled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of decode steps take the steps with prompts along; not the other way round."""
    device = RankDevice(lambda number: True)
    graphs = GraphCache(device, enabled=True)
    with caplog.at_level(logging.WARNING, "hf_async_batching"):
        assert not any(use(graphs, key, uses_until(key, MAX_FAILED_CAPTURES + 2)))
    assert device.captures == MAX_FAILED_CAPTURES
    assert (graphs.enabled, graphs.captures_prompts()) == (enabled, not enabled)
    assert [record.getMessage() for record in caplog.records] == [
        f"{'steps with prompts' if key is PROMPTS else 'decode steps'} cannot be captured as CUDA graphs and run "
        "without: cannot be captured"
    ]


@pytest.mark.parametrize("key", [DECODE, PROMPTS])
def test_a_capture_that_succeeds_begins_the_count_of_failures_anew(key: Captured) -> None:
    often = MAX_FAILED_CAPTURES - 1
    device = RankDevice(lambda number: number != often)
    graphs = GraphCache(device, enabled=True)
    assert use(graphs, key, uses_until(key, often + 1))[-1]
    other = Captured(Padding(32, 8) if key is PROMPTS else 8, GREEDY)
    assert not any(use(graphs, other, uses_until(other, often)))
    assert device.failures == 2 * often
    assert graphs.enabled and graphs.captures_prompts()


def test_a_step_with_prompts_that_failed_comes_as_often_before_it_is_tried_again() -> None:
    graphs = GraphCache(RankDevice(lambda number: number == 0), enabled=True)
    assert use(graphs, PROMPTS, 2 * PADDED_USES + 2) == [False] * (2 * PADDED_USES) + [True] * 2


def test_there_is_room_for_so_many_graphs_of_steps_with_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_PADDED_GRAPHS", 1)
    graphs = GraphCache(RankDevice(), enabled=True)
    use(graphs, DECODE, 2)
    assert graphs.captures_prompts(), "decode steps do not count"
    use(graphs, PROMPTS, PADDED_USES + 1)
    assert not graphs.captures_prompts()
    assert not any(use(graphs, Captured(Padding(32, 8), GREEDY), PADDED_USES + 2))
    assert use(graphs, PROMPTS, 1) == [True], "what is captured goes on"


@pytest.mark.parametrize(("size", "room"), [((1 << 30) - 1, True), (1 << 30, False)])
def test_graphs_take_so_much_memory(size: int, room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = RankDevice()
    monkeypatch.setattr(device, "graph_bytes", lambda: size)
    assert GraphCache(device, enabled=True).captures_prompts() == room


def test_graphs_that_are_forgotten_live_until_their_last_step_has_completed() -> None:
    graphs = GraphCache(RankDevice(), enabled=True)
    use(graphs, DECODE, 2)
    old = graphs.captured[DECODE]
    graphs.forget(7)
    assert not graphs.captured
    assert use(graphs, DECODE, 2) == [False, True], "what new steps need is compiled before a capture, not in it"
    graphs.completed(6)
    assert graphs._replaced == [(7, [old])]
    graphs.completed(7)
    assert graphs._replaced == []
    assert graphs.captured
