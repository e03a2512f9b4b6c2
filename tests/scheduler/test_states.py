"""Plans for rows with states: where pieces of prompts end, and which states are copied before a step."""

from __future__ import annotations

from typing import Any

import pytest

from hf_async_batching.core.plan import Plan, Result, StateCopy
from hf_async_batching.core.request import Request
from hf_async_batching.kv_cache.prefix_cache import PrefixCache
from hf_async_batching.kv_cache.state_snapshots import WORTH_A_COPY, WORTH_A_PIECE
from hf_async_batching.scheduler.scheduler import Scheduler
from hf_async_batching.scheduler.sequence import Sequence
from hf_async_batching.scheduler.waiting_queue import WORTH_WAITING, found_a_step_later

ROWS = 4
SHARED = tuple(range(320))


def make(**changes: Any) -> Scheduler:
    sizes: dict[str, Any] = {
        "num_pages": 900, "page_size": 16, "max_rows": ROWS, "max_batch_tokens": 1000, "snapshots": 16, **changes
    }  # fmt: skip
    return Scheduler(**sizes)


def step(scheduler: Scheduler, token: int = 50) -> Plan:
    plan = scheduler.plan()
    assert plan is not None
    scheduler.complete(Result(plan.step, [token] * plan.num_sampled, None))
    scheduler.check_invariants()
    return plan


def serve(scheduler: Scheduler, name: str, prompt: tuple[int, ...], new: int = 2) -> list[Plan]:
    """The steps of a request that is served alone."""
    scheduler.add(Request(name, prompt, new))
    plans = []
    while scheduler.has_live:
        plans.append(step(scheduler))
    return plans


def pieces(plans: list[Plan]) -> list[int]:
    return [len(chunk.tokens) for plan in plans for chunk in plan.chunks]


def copies(plans: list[Plan]) -> list[StateCopy]:
    return [copy for plan in plans for copy in plan.state_copies]


def test_worth_is_a_number_of_pages() -> None:
    assert WORTH_A_PIECE % 32 == WORTH_A_COPY % 32 == 0


def test_a_piece_ends_where_prompts_part() -> None:
    scheduler = make()
    first = serve(scheduler, "a", (*SHARED, *range(100)))
    assert (pieces(first), copies(first)) == ([420], []), "a first prompt is computed as ever"
    second = serve(scheduler, "b", (*SHARED, 7, *range(500)))
    assert pieces(second) == [320, 496, 5], "and before the last token of the prompt"
    assert [plan.state_copies for plan in second[:3]] == [(), (StateCopy(1, -1),), (StateCopy(1, -2),)]
    third = serve(scheduler, "c", (*SHARED, 8, 9))
    assert (pieces(third), copies(third)) == ([2], [StateCopy(-1, 1)])
    assert third[0].new_rows[0].start == 320
    assert third[0].state_copies, "before its first piece"
    again = serve(scheduler, "d", (*SHARED, 7, *range(500)))
    assert (pieces(again), copies(again)) == ([5], [StateCopy(-2, 1)])
    prefixes = scheduler.pages.prefixes
    assert (prefixes.query_tokens, prefixes.hit_tokens) == (420 + 821 + 322 + 821, 320 + 816)


def test_budgets_end_pieces_too() -> None:
    scheduler = make(max_batch_tokens=200)
    serve(scheduler, "a", (*SHARED, 1))
    second = serve(scheduler, "b", (*SHARED, 2))
    assert pieces(second) == [200, 120, 1]
    assert copies(second) == [StateCopy(1, -1)]


def test_the_next_turn_starts_behind_the_answer() -> None:
    scheduler = make()
    prompt = tuple(range(40))
    plans = serve(scheduler, "a", prompt, 150)
    # At the first page border from WORTH_A_COPY tokens on, and every WORTH_A_COPY tokens after.
    assert [plan.step for plan in plans if plan.state_copies] == [64 - 40 + 1, 128 - 40 + 1]
    assert copies(plans) == [StateCopy(1, -1), StateCopy(1, -2)]
    assert all(plan.new_pages for plan in plans if plan.state_copies)
    turn = serve(scheduler, "b", (*prompt, *[50] * 150, 1, 2, 3))
    assert turn[0].new_rows[0].start == 128
    assert turn[0].state_copies == (StateCopy(-2, 1),)


@pytest.mark.parametrize("scarce", [False, True])
def test_a_page_that_is_taken_alone_has_a_snapshot_too(scarce: bool) -> None:
    """When pages are short, rows get them one by one."""
    scheduler = make(num_pages=9 if scarce else 90)
    for name in "ab":
        scheduler.add(Request(name, tuple(range(ord(name), ord(name) + 62)), 20))
    plans = []
    while scheduler.has_live:
        plans.append(step(scheduler))
    assert scheduler.preemptions == scarce
    # Both rows are full after 64 tokens.
    first = next(plan for plan in plans if plan.new_pages and not plan.chunks)
    assert first.state_copies == (StateCopy(1, -1), *([] if scarce else [StateCopy(2, -2)]))


def test_a_preempted_sequence_starts_behind_its_snapshot() -> None:
    scheduler = make(num_pages=10)
    scheduler.add(Request("old", tuple(range(100, 120)), 60))
    scheduler.add(Request("young", tuple(range(200, 262)), 40))
    while not scheduler.preemptions:
        step(scheduler)
    while True:
        plan = step(scheduler)
        if plan.new_rows:
            break
    (start,) = plan.new_rows
    assert start.request.request_id == "young" and start.start >= 64
    assert any(copy.source < 0 for copy in plan.state_copies)


# -- who waits for whom -----------------------------------------------------------------------------------------------


def starts(scheduler: Scheduler, steps: int) -> list[list[str]]:
    return [[new.request.request_id for new in step(scheduler).new_rows] for _ in range(steps)]


def test_who_shares_a_prefix_waits_for_its_snapshot() -> None:
    scheduler = make()
    serve(scheduler, "first", (*SHARED, 1))
    for name in "abc":
        scheduler.add(Request(name, (*SHARED, ord(name), 5), 9))
    scheduler.add(Request("other", (9, 9), 9))
    assert starts(scheduler, 2) == [["a", "other"], ["b", "c"]]
    assert scheduler.pages.prefixes.hit_tokens == 2 * 320


def test_it_waits_as_many_steps_as_the_prefix_takes() -> None:
    scheduler = make(max_batch_tokens=100)
    serve(scheduler, "first", (*SHARED, 1))
    for name in "ab":
        scheduler.add(Request(name, (*SHARED, ord(name), 5), 9))
    assert starts(scheduler, 5) == [["a"], [], [], [], ["b"]]


@pytest.mark.parametrize(
    "prompt",
    [(*SHARED[:319], 9, 9, 9), SHARED, (*SHARED[:250], *range(90))],
    ids=["the last page differs", "its last token is left over", "little is shared"],
)
def test_who_cannot_use_the_snapshot_does_not_wait(prompt: tuple[int, ...]) -> None:
    scheduler = make()
    serve(scheduler, "first", (*SHARED, 1))
    scheduler.add(Request("a", (*SHARED, 3, 5), 9))
    scheduler.add(Request("b", prompt, 9))
    assert starts(scheduler, 1) == [["a", "b"]]


def test_a_snapshot_must_bring_much_more() -> None:
    cache, tokens = PrefixCache(16), (*SHARED, *SHARED)
    start = cache.enter(cache.find(None, tokens), tokens, [1, 2], 2)
    waits, computed = (Sequence(Request(name, tokens, 4), 0) for name in "ab")
    waits.pages.last_node = computed.pages.last_node = start
    reached = 32 + WORTH_WAITING
    for borders, expected in (([32], False), ([reached - 16], False), ([reached], True), ([32, reached], True)):
        computed.pages.borders = borders
        assert found_a_step_later(waits, [computed], 16, states=True) is expected


def test_nobody_waits_for_prompts_without_snapshots() -> None:
    scheduler = make()
    for name in "ab":
        scheduler.add(Request(name, (*SHARED, ord(name), 5), 9))
    assert starts(scheduler, 1) == [["a", "b"]]


def test_places_come_back_with_cancelled_requests() -> None:
    scheduler = make(snapshots=8)
    serve(scheduler, "first", (*SHARED, 1))
    for name in "abcd":
        scheduler.add(Request(name, (*SHARED, ord(name), *range(400)), 9))
    for name in "abcd":
        for _ in range(2):
            step(scheduler)
        scheduler.cancel(name)
        scheduler.check_invariants()
    assert scheduler.kv_cache.snapshots is not None
    scheduler.weights_updated()
    assert scheduler.kv_cache.snapshots._ids.in_use == 0
