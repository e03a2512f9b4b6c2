"""The scheduler's policy, step by step, without a device: a test plays the device and says what was sampled."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import weakref
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import hf_async_batching
import hf_async_batching.scheduler.plan_builder as builder_module
from hf_async_batching.core.outcomes import FIRST_UNSOUND, UNDRAWABLE, UNDRAWABLE_UNSOUND
from hf_async_batching.core.plan import Features, Plan, Result
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.kv_cache.id_pool import IdPool
from hf_async_batching.scheduler.outputs import TokenOutput
from hf_async_batching.scheduler.running import RunningSequences
from hf_async_batching.scheduler.scheduler import Scheduler
from hf_async_batching.scheduler.sequence import State

EOS = 7


def request(name: str, prompt: int = 3, new: int = 4, **changes: Any) -> Request:
    """A request whose prompt tokens say whose they are and where they stand."""
    return Request(name, tuple(1000 * (ord(name[0]) - 96) + i for i in range(prompt)), new, **changes)


def make(**changes: int) -> Scheduler:
    sizes = {"num_pages": 16, "page_size": 4, "max_rows": 4, "max_batch_tokens": 8, **changes}
    return Scheduler(**sizes)


def planned(scheduler: Scheduler) -> Plan:
    plan = scheduler.plan()
    scheduler.check_invariants()
    assert plan is not None
    assert plan.num_tokens <= scheduler.max_batch_tokens
    return plan


def settle(scheduler: Scheduler, plan: Plan, *tokens: int) -> list[TokenOutput]:
    """Complete a step; token 50 for every sampled position where none are given."""
    given = list(tokens) if tokens else [50] * plan.num_sampled
    emissions = scheduler.complete(Result(plan.step, given))
    scheduler.check_invariants()
    return emissions


def step(scheduler: Scheduler, *tokens: int) -> tuple[Plan, list[TokenOutput]]:
    plan = planned(scheduler)
    return plan, settle(scheduler, plan, *tokens)


def state_of(scheduler: Scheduler, request_id: str) -> State:
    """The state of a request; FINISHED for one that the scheduler no longer knows."""
    sequence = scheduler._live.get(request_id)
    return State.FINISHED if sequence is None else sequence.state


def chunk_sizes(plan: Plan) -> list[tuple[int, int, bool]]:
    return [(chunk.row, len(chunk.tokens), chunk.samples) for chunk in plan.chunks]


def started(plan: Plan) -> list[str]:
    return [new.request.request_id for new in plan.new_rows]


# -- groups of layers -------------------------------------------------------------------------------------------------


def test_who_waits_is_not_looked_up_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what was found is of no use, because pages of windows were given up."""
    scheduler = make(num_pages=24, max_rows=4, max_batch_tokens=40, window=4, groups=2, full_attention_groups=1)
    scheduler.add(request("a", prompt=20, new=1))
    step(scheduler)
    prefixes = scheduler.pages.prefixes
    for node in set(prefixes._nodes.values()):
        IdPool.release(scheduler.pages, prefixes._forget(node, 1))
    keys: list[int] = []
    key = type(prefixes)._key
    monkeypatch.setattr(type(prefixes), "_key", lambda self, *args: keys.append(1) or key(self, *args))
    for name in "bc":
        scheduler.add(request(name, prompt=16, new=8))
    scheduler.add(Request("d", request("a", prompt=20).prompt, 4))
    step(scheduler)
    keys.clear()
    for _ in range(3):
        step(scheduler)
    assert (scheduler.num_waiting, scheduler.rows.available) == (1, 2), "it waits for pages"
    assert keys == []


# -- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_pages_before_the_window_are_given_back(prefix_cache: bool) -> None:
    """The prompt of 21 tokens fills 6 pages of 4; with a window of 6, tokens see 2 to 3 pages."""
    scheduler = make(window=6, prefix_cache=prefix_cache)
    scheduler.add(request("a", prompt=21, new=30))
    held = [(step(scheduler), scheduler.pages.in_use)[1] for _ in range(3)]
    # Pieces of 8, 8 and 5: before the second and the third, what lies before positions 3 and 11 is passed.
    assert held == [6, 6, 4]
    held = [(step(scheduler), scheduler.pages.in_use)[1] for _ in range(28)]
    assert max(held[8:]) <= 3
    step(scheduler)
    assert scheduler.pages.in_use == 0


def test_passed_pages_wait_for_the_steps_in_flight() -> None:
    scheduler = make(window=1, max_batch_tokens=4)
    scheduler.add(request("a", prompt=8, new=2))
    first, second = planned(scheduler), planned(scheduler)
    assert scheduler.pages.in_use == 2, "the first step may still read its page"
    settle(scheduler, first)
    assert scheduler.pages.in_use == 1
    settle(scheduler, second)


def test_a_sequence_with_passed_pages_is_computed_again_whole() -> None:
    scheduler = make(window=3, num_pages=5, max_rows=2, prefix_cache=False)
    scheduler.add(request("a", prompt=4, new=16))
    scheduler.add(request("b", prompt=7, new=13))
    for _ in range(60):
        if not scheduler.has_live:
            break
        step(scheduler)
    assert not scheduler.has_live
    assert scheduler.pages.in_use == 0


# -- admission and chunked prefill --------------------------------------------------------------------------------


def test_admission_in_order_of_arrival() -> None:
    scheduler = make(max_rows=2)
    for name in "abc":
        scheduler.add(request(name, new=2 if name == "a" else 9))
    first, _ = step(scheduler)
    assert started(first) == ["a", "b"]
    assert [state_of(scheduler, name) for name in "abc"] == [State.DECODING, State.DECODING, State.WAITING]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    second, ended = step(scheduler)
    assert started(second) == []
    assert ended[0] == TokenOutput("a", 50, None, "length")
    third, _ = step(scheduler)
    assert started(third) == ["c"]
    assert third.new_rows[0].row == first.new_rows[0].row, "the row of `a` is free again"


def test_a_first_step_in_full() -> None:
    scheduler = make()
    scheduler.add(request("a", prompt=5, new=2))
    plan = planned(scheduler)
    assert plan.step == 0
    assert plan.decode_rows == ()
    assert plan.chunks == ((1, (1000, 1001, 1002, 1003, 1004), True),)
    assert [(new.row, new.request.request_id) for new in plan.new_rows] == [(1, "a")]
    assert plan.new_pages == ((1, 0, 1), (1, 1, 2))
    assert (plan.num_tokens, plan.num_sampled) == (5, 1)
    assert settle(scheduler, plan, 42) == [TokenOutput("a", 42)]


def test_prompts_in_pieces_beside_decoding_rows() -> None:
    scheduler = make(max_batch_tokens=8)
    scheduler.add(request("a", prompt=2, new=9))
    step(scheduler)
    scheduler.add(request("b", prompt=17, new=4))
    scheduler.add(request("c", prompt=3, new=4))
    plans = [step(scheduler)[0] for _ in range(4)]
    # One token of the budget goes to `a`, the rest to the prompt of `b`, and what that leaves to `c`.
    assert [plan.decode_rows for plan in plans] == [(1,), (1,), (1,), (1, 2, 3)]
    assert [chunk_sizes(plan) for plan in plans] == [
        [(2, 7, False)],
        [(2, 7, False)],
        [(2, 3, True), (3, 3, True)],
        [],
    ]
    assert [plan.num_sampled for plan in plans] == [1, 1, 3, 3]
    pieces = [token for plan in plans for chunk in plan.chunks if chunk.row == 2 for token in chunk.tokens]
    assert pieces == list(request("b", prompt=17).prompt)
    assert started(plans[0]) == ["b"]
    assert started(plans[2]) == ["c"]


def test_running_prompts_come_before_waiting_ones() -> None:
    scheduler = make(max_batch_tokens=8)
    scheduler.add(request("a", prompt=12))
    scheduler.add(request("b", prompt=12))
    assert chunk_sizes(step(scheduler)[0]) == [(1, 8, False)]
    assert state_of(scheduler, "a") is State.PREFILLING
    assert state_of(scheduler, "b") is State.WAITING
    assert chunk_sizes(step(scheduler)[0]) == [(1, 4, True), (2, 4, False)]


def test_nobody_overtakes_a_head_that_waits_for_pages() -> None:
    scheduler = make(num_pages=4, page_size=4)
    scheduler.add(request("a", prompt=7, new=9))
    step(scheduler)
    scheduler.add(request("b", prompt=8, new=2))  # two pages are free, and it wants a third for its first token
    scheduler.add(request("c", prompt=1, new=1))
    plan, _ = step(scheduler)
    assert started(plan) == []
    assert scheduler.num_waiting == 2


def test_admission_keeps_a_page_for_the_first_token() -> None:
    scheduler = make(num_pages=2, page_size=4)
    scheduler.add(request("a", prompt=4, new=2))
    assert started(planned(scheduler)) == ["a"]
    other = make(num_pages=3, page_size=4)
    other.add(request("a", prompt=2, new=2))
    other.add(request("b", prompt=8, new=4))
    assert started(planned(other)) == ["a"]


# -- decoding, ends, and what is in flight ------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_stop_by_length_is_planned_exactly_once(depth: int) -> None:
    scheduler = make()
    scheduler.add(request("a", new=5))
    scheduler.add(request("b", new=2))
    emitted, plans = run(scheduler, depth)
    assert sum(plan.num_sampled for plan in plans) == 7, "a surplus step was planned"
    assert [(e.request_id, e.finish_reason) for e in emitted if e.finish_reason] == [("b", "length"), ("a", "length")]
    assert scheduler.plan() is None
    assert not scheduler.has_live


def run(
    scheduler: Scheduler, depth: int, tokens: dict[int, list[int]] | None = None
) -> tuple[list[TokenOutput], list[Plan]]:
    """Until nothing is left, with `depth` steps in flight; `tokens` by step."""
    emitted: list[TokenOutput] = []
    plans: list[Plan] = []
    flying: deque[Plan] = deque()
    while scheduler.has_live or flying:
        plan = scheduler.plan()
        scheduler.check_invariants()
        if plan is not None:
            plans.append(plan)
            flying.append(plan)
        assert flying, "the scheduler has live requests, nothing in flight, and no plan"
        if plan is None or len(flying) >= depth:
            oldest = flying.popleft()
            emitted += settle(scheduler, oldest, *(tokens or {}).get(oldest.step, []))
    assert scheduler.pages.in_use == scheduler.rows.in_use == 0
    return emitted, plans


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_surplus_tokens_after_eos_are_dropped(depth: int) -> None:
    scheduler = make()
    scheduler.add(request("a", new=9, eos_token_ids=(3, EOS)))
    emitted, plans = run(scheduler, depth, {1: [EOS], 2: [EOS], 3: [60]})
    assert emitted == [TokenOutput("a", 50), TokenOutput("a", EOS, None, "eos")]
    assert sum(plan.num_sampled for plan in plans) == 2 + (depth - 1), "one surplus step per level of depth"


def test_eos_wins_over_length() -> None:
    scheduler = make()
    scheduler.add(request("a", new=1, eos_token_ids=(EOS,)))
    assert step(scheduler, EOS)[1] == [TokenOutput("a", EOS, None, "eos")]


def test_log_probabilities_go_with_their_tokens() -> None:
    scheduler = make()
    for name in "ab":
        scheduler.add(request(name, new=1 if name == "a" else 2, sampling=SamplingParams(logprobs=True)))
    plan = planned(scheduler)
    emissions = scheduler.complete(Result(plan.step, [50, 51], [-0.5, -0.7]))
    assert emissions == [TokenOutput("a", 50, -0.5, "length"), TokenOutput("b", 51, -0.7)]


def test_pages_and_rows_are_retired_not_freed() -> None:
    scheduler = make(num_pages=3, page_size=4, max_rows=1)
    scheduler.add(request("a", prompt=3, new=8, eos_token_ids=(EOS,)))
    scheduler.add(request("b", prompt=3, new=1))
    flying = [planned(scheduler) for _ in range(3)]
    assert settle(scheduler, flying[0], EOS) == [TokenOutput("a", EOS, None, "eos")]
    assert state_of(scheduler, "a") is State.FINISHED
    # Steps 1 and 2 still read and write them.
    for flight in flying[1:]:
        assert (scheduler.pages.in_use, scheduler.rows.in_use) == (2, 1)
        assert scheduler.plan() is None
        settle(scheduler, flight)
    assert (scheduler.pages.in_use, scheduler.rows.in_use) == (0, 0)
    assert started(planned(scheduler)) == ["b"]


def test_the_rows_of_a_prompt_that_samples_nothing_are_retired_too() -> None:
    scheduler = make(max_batch_tokens=4)
    scheduler.add(request("a", prompt=12))
    flying = [planned(scheduler), planned(scheduler)]
    assert all(plan.num_sampled == 0 for plan in flying)
    assert scheduler.cancel("a") == TokenOutput("a", None, None, "cancelled")
    assert settle(scheduler, flying[0]) == []
    assert scheduler.rows.in_use == 1
    settle(scheduler, flying[1])
    assert scheduler.rows.in_use == scheduler.pages.in_use == 0


def test_unchanged_decode_rows_are_the_same_object() -> None:
    scheduler = make()
    scheduler.add(request("a", new=12))
    scheduler.add(request("b", new=6))
    step(scheduler)
    decodes = [step(scheduler)[0].decode_rows for _ in range(4)]
    assert decodes[0] == (1, 2)
    assert all(rows is decodes[0] for rows in decodes), "a page more is no change of rows"
    step(scheduler)
    fewer = [step(scheduler)[0].decode_rows for _ in range(2)]
    assert fewer[0] == (1,)
    assert fewer[0] is fewer[1]


def test_a_page_is_taken_when_the_last_one_is_full() -> None:
    scheduler = make(page_size=4)
    scheduler.add(request("a", prompt=3, new=8))
    plans = [step(scheduler)[0] for _ in range(8)]
    pages = [[page.ordinal for page in plan.new_pages] for plan in plans]
    assert pages == [[0], [], [1], [], [], [], [2], []]


def test_a_steady_step_looks_at_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, features and groups are derived again when a sequence joins or leaves, and not for each token or page."""
    derived: list[str] = []
    features, regroup = builder_module.features_of, RunningSequences._sort
    monkeypatch.setattr(builder_module, "features_of", lambda *s: derived.append("features") or features(*s))
    monkeypatch.setattr(RunningSequences, "_sort", lambda self: derived.append("groups") or regroup(self))
    scheduler = make(num_pages=32)
    scheduler.add(request("a", new=30))
    scheduler.add(request("b", new=20))
    step(scheduler)
    step(scheduler)
    derived.clear()
    plans = [step(scheduler)[0] for _ in range(17)]
    assert sum(len(plan.new_pages) for plan in plans) > 6
    assert derived == []
    step(scheduler)
    step(scheduler)
    assert "features" in derived and "groups" in derived, "`b` has ended"


# -- preemption ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_preemption_takes_the_youngest_and_computes_it_again(prefix_cache: bool) -> None:
    scheduler = make(num_pages=5, page_size=4, max_batch_tokens=16, prefix_cache=prefix_cache)
    scheduler.add(request("a", prompt=4, new=10))
    scheduler.add(request("b", prompt=4, new=10))
    token = iter(range(100, 200))
    outputs: dict[str, list[int]] = {"a": [], "b": []}
    again: Plan | None = None
    while scheduler.has_live:
        plan = planned(scheduler)
        if plan.step and plan.new_rows:
            assert again is None
            again = plan
            known = (*request("b", prompt=4).prompt, *outputs["b"])
            # Of its pages, `a` took the last one only; its prompt's page is still there.
            assert plan.new_rows[0].start == (4 if prefix_cache else 0)
            assert plan.chunks[-1].tokens == known[plan.new_rows[0].start :]
            assert started(plan) == ["b"]
        for emission in settle(scheduler, plan, *[next(token) for _ in range(plan.num_sampled)]):
            assert emission.token is not None
            outputs[emission.request_id].append(emission.token)
    assert again is not None
    assert scheduler.preemptions == 1
    assert [len(tokens) for tokens in outputs.values()] == [10, 10]
    prefixes = scheduler.pages.prefixes
    assert (prefixes.query_tokens, prefixes.hit_tokens) == (8 * prefix_cache, 0), "one's own pages are no hits"


def test_the_oldest_is_never_preempted_and_ends_first() -> None:
    scheduler = make(num_pages=4, page_size=4, max_rows=4, max_batch_tokens=8)
    for name in "abcd":
        scheduler.add(request(name, prompt=3, new=12))
    ends: list[str] = []
    rows: list[int] = []
    flying: deque[Plan] = deque()
    while scheduler.has_live or flying:
        plan = scheduler.plan()
        scheduler.check_invariants()
        if plan is not None:
            flying.append(plan)
            rows += [new.row for new in plan.new_rows if new.request.request_id == "a"]
        if plan is None or len(flying) == 2:
            ends += [e.request_id for e in settle(scheduler, flying.popleft()) if e.finish_reason]
    assert scheduler.preemptions >= 3
    assert len(rows) == 1, "the oldest started more than once"
    assert ends == list("abcd")


def test_a_preempted_sequence_waits_for_its_tokens_in_flight() -> None:
    scheduler = make(num_pages=4, page_size=4, max_batch_tokens=16)
    scheduler.add(request("a", prompt=7, new=8))
    scheduler.add(request("b", prompt=3, new=8))
    first = planned(scheduler)  # a 2 pages, b 1
    second = planned(scheduler)  # fills them: a 8 tokens, b 4
    third = planned(scheduler)  # `a` takes the last page, `b` goes back to the queue
    assert scheduler.preemptions == 1
    assert state_of(scheduler, "b") is State.WAITING
    assert third.decode_rows == (1,)
    settle(scheduler, first, 50, 60)
    fourth = planned(scheduler)
    assert started(fourth) == []
    # The token in flight was sampled from good pages: it counts.
    assert settle(scheduler, second, 51, 61)[1] == TokenOutput("b", 61)
    settle(scheduler, third)
    settle(scheduler, fourth)
    emissions, plans = run(scheduler, 1)
    restart = next(plan for plan in plans if started(plan) == ["b"])
    assert restart.chunks[0].tokens == (*request("b").prompt, 60, 61)
    assert sum(e.request_id == "b" for e in emissions) == 6


@pytest.mark.parametrize("eos", [True, False])
def test_a_preempted_sequence_can_end_with_a_token_in_flight(eos: bool) -> None:
    scheduler = make(num_pages=4, page_size=4, max_batch_tokens=16)
    scheduler.add(request("a", prompt=7, new=8))
    scheduler.add(request("b", prompt=3, new=8 if eos else 3, eos_token_ids=(EOS,)))
    first, second = planned(scheduler), planned(scheduler)
    if not eos:
        # The third token of `b` needs a page, which `a` takes in the same step.
        third = planned(scheduler)
        assert state_of(scheduler, "b") is State.WAITING
        settle(scheduler, first)
        settle(scheduler, second)
        settle(scheduler, third)
        emissions, _ = run(scheduler, 1)
        assert [e.finish_reason for e in emissions if e.request_id == "b"] == ["length"]
        return
    planned(scheduler)
    assert state_of(scheduler, "b") is State.WAITING
    settle(scheduler, first)
    assert settle(scheduler, second, 50, EOS)[1] == TokenOutput("b", EOS, None, "eos")
    assert scheduler.num_waiting == 0
    assert state_of(scheduler, "b") is State.FINISHED


def test_a_victim_takes_no_page_in_the_step_that_preempts_it() -> None:
    """Both fill their last page at once; the older one takes the younger one's, which are free at once."""
    scheduler = make(num_pages=4, page_size=4, max_batch_tokens=16)
    scheduler.add(request("a", prompt=7, new=6))
    scheduler.add(request("b", prompt=7, new=6))
    step(scheduler)
    assert step(scheduler)[0].decode_rows == (1, 2)
    third = planned(scheduler)
    assert state_of(scheduler, "b") is State.WAITING
    assert third.decode_rows == (1,)
    assert [page.row for page in third.new_pages] == [1]
    assert scheduler.pages.available == 1


def with_groups(groups: int, num_pages: int) -> Scheduler:
    """The pages are those of each group; all groups but the first have a window that nothing here reaches."""
    sizes = {"groups": groups, "full_attention_groups": 1, "window": 99} if groups > 1 else {}
    return make(num_pages=num_pages * groups, page_size=4, max_batch_tokens=16, **sizes)


@pytest.mark.parametrize("groups", [1, 2])
def test_pages_on_their_way_back_spare_a_victim(groups: int) -> None:
    """Where a retired request's pages return with the next step, nobody is thrown out for them."""
    scheduler = with_groups(groups, 3)
    scheduler.add(request("a", prompt=3, new=6))
    scheduler.add(request("b", prompt=1, new=9))
    scheduler.add(request("c", prompt=1, new=9, eos_token_ids=(EOS,)))
    first, second = planned(scheduler), planned(scheduler)
    assert scheduler.pages.available == 0
    settle(scheduler, first, 50, 60, EOS)
    third = planned(scheduler)  # `a` has filled its page; the page of `c` is still in use by step 1
    assert scheduler.preemptions == 0
    assert third.decode_rows == (2,)
    settle(scheduler, second)
    assert planned(scheduler).decode_rows == (1, 2)
    assert scheduler.preemptions == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_a_page_on_its_way_back_is_promised_once(groups: int) -> None:
    """Two rows want a page and one is on its way: for the other one the youngest makes room."""
    scheduler = with_groups(groups, 4)
    for name, prompt in (("a", 3), ("b", 3), ("c", 1), ("d", 1)):
        scheduler.add(request(name, prompt=prompt, new=9, eos_token_ids=(EOS,)))
    first, second = planned(scheduler), planned(scheduler)
    settle(scheduler, first, 50, 60, EOS, 80)
    assert scheduler.plan() is None, "the pages of `c` and `d` are still in use by step 1"
    scheduler.check_invariants()
    assert scheduler.preemptions == 1
    assert state_of(scheduler, "d") is State.WAITING
    settle(scheduler, second)
    third = planned(scheduler)
    assert third.decode_rows == (1, 2)
    assert len(third.new_pages) == 2 * groups
    assert scheduler.preemptions == 1


# -- the prefix cache ---------------------------------------------------------------------------------------------


def prompt_of(name: str, *tokens: int, new: int = 4, **changes: Any) -> Request:
    return Request(name, tokens, new, **changes)


def test_a_prompt_starts_after_the_pages_that_are_known() -> None:
    scheduler = make(max_batch_tokens=16)
    scheduler.add(prompt_of("a", *range(10), new=9))
    first, _ = step(scheduler)
    assert first.new_rows[0].start == 0
    scheduler.add(prompt_of("b", *range(9), 77))
    plan, _ = step(scheduler)
    assert plan.new_rows[0].start == 8
    assert chunk_sizes(plan) == [(2, 2, True)]
    assert plan.chunks[0].tokens == (8, 77)
    # The first two pages are those of `a`; the third one is its own.
    assert [(page.row, page.ordinal, page.page) for page in plan.new_pages] == [(2, 0, 1), (2, 1, 2), (2, 2, 4)]
    assert scheduler.pages.in_use == 4
    prefixes = scheduler.pages.prefixes
    assert (prefixes.query_tokens, prefixes.hit_tokens) == (20, 8)


def test_pages_are_found_by_later_steps_only() -> None:
    scheduler = make(max_batch_tokens=16)
    scheduler.add(prompt_of("a", *range(8)))
    scheduler.add(prompt_of("b", *range(8), new=1))
    first = planned(scheduler)
    assert [new.start for new in first.new_rows] == [0, 0], "nobody finds what this very step writes"
    scheduler.add(prompt_of("c", *range(9), new=1))
    assert planned(scheduler).new_rows[0].start == 8, "planned before is enough: steps run in order"


def test_a_prompt_in_pieces_is_found_piece_by_piece() -> None:
    scheduler = make(max_batch_tokens=8)
    scheduler.add(prompt_of("a", *range(20)))
    step(scheduler)
    scheduler.add(prompt_of("b", *range(20)))
    plans = [step(scheduler)[0] for _ in range(2)]
    assert [started(plan) for plan in plans] == [[], ["b"]]
    assert plans[1].new_rows[0].start == 16, "four full pages of `a`; its last one holds the last token"


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_completion_is_found_by_the_next_turn(depth: int) -> None:
    scheduler = make(max_batch_tokens=32, page_size=4)
    scheduler.add(prompt_of("a", *range(6), new=7))
    emitted, _ = run(scheduler, depth, {i: [100 + i] for i in range(7)})
    reply = [e.token for e in emitted if e.token is not None]
    assert reply == [100 + i for i in range(7)]
    assert scheduler.pages.prefixes.num_unheld == 3
    scheduler.add(prompt_of("b", *range(6), *reply, 55, 56, new=1))
    # 13 tokens, of which the last was never an input.
    assert step(scheduler)[0].new_rows[0].start == 12


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_live_completion_is_found_page_by_page(depth: int) -> None:
    scheduler = make(max_batch_tokens=32, page_size=4)
    scheduler.add(prompt_of("a", *range(4), new=24))
    flying: deque[Plan] = deque()
    for _ in range(18):
        flying.append(planned(scheduler))
        if len(flying) >= depth:
            settle(scheduler, flying.popleft())
    node = scheduler.pages.prefixes.find(None, [*range(4), *[50] * 40])
    # 4 + 17 tokens stand in pages; a page whose last token has not settled, or just so, becomes known later.
    assert node.depth == {1: 5, 2: 4, 3: 4}[depth]


@pytest.mark.parametrize("length", [5, 7])
def test_an_end_and_what_comes_after_it_are_not_found(length: int) -> None:
    scheduler = make(max_batch_tokens=32, page_size=4)
    scheduler.add(prompt_of("a", *range(length), new=20, eos_token_ids=(EOS,)))
    flying = [planned(scheduler) for _ in range(5)]
    settle(scheduler, flying[0], EOS)
    for plan in flying[1:]:
        settle(scheduler, plan, 60)
    assert scheduler.pages.prefixes.num_unheld == 1
    assert scheduler.pages.prefixes.find(None, [*range(length), EOS, 60, 60, 60, 60]).depth == 1


def test_a_head_that_shares_needs_less_room() -> None:
    scheduler = make(num_pages=6, max_batch_tokens=16)
    scheduler.add(prompt_of("a", *range(12), new=5))
    step(scheduler)
    scheduler.add(prompt_of("z", *range(900, 908), new=5))
    scheduler.add(prompt_of("b", *range(12), 12, new=3))
    plan, _ = step(scheduler)  # three of the pages are held by `a`, which takes its fourth
    assert started(plan) == []
    assert scheduler.cancel("z") is not None
    assert started(step(scheduler)[0]) == ["b"]
    assert scheduler.pages.in_use == 5


def test_known_pages_that_nobody_holds_take_room() -> None:
    """They are no free pages on top of themselves."""
    scheduler = make(num_pages=4, max_batch_tokens=16)
    scheduler.add(prompt_of("a", *range(12), new=1))
    step(scheduler)
    assert (scheduler.pages.available, scheduler.pages.prefixes.num_unheld) == (4, 3)
    scheduler.add(prompt_of("x", *range(900, 903), new=5))
    step(scheduler)
    scheduler.add(prompt_of("b", *range(12), new=2))
    assert started(step(scheduler)[0]) == [], "it needs four, and three are left"
    scheduler.cancel("x")
    plan, _ = step(scheduler)
    assert started(plan) == ["b"]
    assert plan.new_rows[0].start == 8


def test_shared_pages_on_their_way_back_are_no_room() -> None:
    """Two rows want a page; of those that `c` held, all but one are also held by `b`, so that the youngest must go."""
    scheduler = make(num_pages=6, max_batch_tokens=16)
    for name in ("a", "z"):
        scheduler.add(prompt_of(name, *range(900, 903), new=9))
    scheduler.add(prompt_of("b", *range(8), new=9))
    step(scheduler)
    scheduler.add(prompt_of("c", *range(8), 1, new=9))
    second = planned(scheduler)
    assert second.new_rows[0].start == 8
    assert scheduler.pages.available == 0
    scheduler.cancel("c")
    assert scheduler.plan() is None
    assert (scheduler.preemptions, state_of(scheduler, "b")) == (1, State.WAITING)
    settle(scheduler, second)
    assert planned(scheduler).decode_rows == (1, 2)
    assert scheduler.preemptions == 1


def test_entries_of_a_step_fit_its_buffers() -> None:
    scheduler = make(num_pages=5, max_batch_tokens=16, max_rows=4)
    scheduler.add(prompt_of("a", *range(12), new=1))
    step(scheduler)
    for name in "bcd":
        scheduler.add(prompt_of(name, *range(9), new=1))
    plans = [planned(scheduler) for _ in range(2)]
    assert [started(plan) for plan in plans] == [["b"], ["c"]], "each has three entries, and the buffers five"


def test_other_weights_find_nothing() -> None:
    scheduler = make(max_batch_tokens=16)
    scheduler.add(prompt_of("a", *range(8), new=9))
    scheduler.add(prompt_of("b", *range(100, 108), new=1))
    step(scheduler)
    assert scheduler.pages.prefixes.num_unheld == 2
    scheduler.weights_updated()
    assert scheduler.pages.in_use == 2
    scheduler.add(prompt_of("c", *range(8), 5, new=1))
    scheduler.add(prompt_of("d", *range(100, 108), 5, new=1))
    assert [new.start for new in step(scheduler)[0].new_rows] == [0, 0]
    # `a` ends without its pages becoming known: the first are old, and the others come from them.
    run(scheduler, 1)
    scheduler.add(prompt_of("e", *range(8), 50, 50, 50, 50, 50, new=1))
    assert step(scheduler)[0].new_rows[0].start == 8, "of `c`, whose tokens differ behind"


def test_switched_off_nobody_shares() -> None:
    scheduler = make(max_batch_tokens=16, prefix_cache=False)
    for name in "ab":
        scheduler.add(prompt_of(name, *range(8), new=1))
        assert step(scheduler)[0].new_rows[0].start == 0
    assert scheduler.pages.prefixes.query_tokens == scheduler.pages.prefixes.num_unheld == 0


# -- requests that come and go ------------------------------------------------------------------------------------


def test_ids_are_unique_among_live_requests() -> None:
    scheduler = make()
    scheduler.add(request("a", new=1))
    with pytest.raises(ValueError, match="'a' is in use"):
        scheduler.add(request("a"))
    step(scheduler)
    scheduler.add(request("a", new=1))
    assert step(scheduler)[1][0].finish_reason == "length"


def test_a_request_that_can_never_fit_is_refused() -> None:
    scheduler = make(num_pages=3, page_size=4)
    with pytest.raises(ValueError, match="needs 4 pages, the cache has 3"):
        scheduler.add(request("a", prompt=9, new=4))
    assert not scheduler.has_live
    assert scheduler.num_waiting == 0
    scheduler.add(request("a", prompt=9, new=3))
    emitted, _ = run(scheduler, 2)
    assert len(emitted) == 3


def test_the_budget_must_hold_every_row() -> None:
    with pytest.raises(ValueError, match=r"`max_batch_tokens` \(3\) must be at least `max_rows` \(4\)"):
        make(max_rows=4, max_batch_tokens=3)


def test_nothing_to_do_is_no_plan() -> None:
    scheduler = make()
    assert scheduler.plan() is None
    assert not scheduler.has_live
    assert state_of(scheduler, "a") is State.FINISHED


@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "in flight", "preempted"])
def test_cancel_in_every_state(state: str) -> None:
    scheduler = make(num_pages=4, page_size=4, max_batch_tokens=8)
    flying: list[Plan] = []
    if state == "waiting":
        scheduler.add(request("x", prompt=8, new=4))
        flying.append(planned(scheduler))
        scheduler.add(request("a"))
        assert state_of(scheduler, "a") is State.WAITING
    elif state == "prefilling":
        scheduler.add(request("a", prompt=12))
        flying.append(planned(scheduler))
        assert state_of(scheduler, "a") is State.PREFILLING
    elif state in ("decoding", "in flight"):
        scheduler.add(request("a"))
        flying.append(planned(scheduler))
        if state == "decoding":
            settle(scheduler, flying.pop())
        else:
            flying.append(planned(scheduler))
        assert state_of(scheduler, "a") is State.DECODING
    else:
        scheduler.add(request("x", prompt=5, new=8))
        scheduler.add(request("a", prompt=3, new=8))
        flying += [planned(scheduler) for _ in range(4)]
        assert scheduler.plan() is None, "the pages of `a` are still in use"
        assert scheduler.preemptions == 1
        assert state_of(scheduler, "a") is State.WAITING
    assert scheduler.cancel("a") == TokenOutput("a", None, None, "cancelled")
    scheduler.check_invariants()
    assert state_of(scheduler, "a") is State.FINISHED
    assert scheduler.cancel("a") is None
    emissions = [e for plan in flying for e in settle(scheduler, plan)]
    rest, plans = run(scheduler, 2)
    assert "a" not in {e.request_id for e in emissions + rest}
    assert not any("a" in started(plan) for plan in plans)


def test_cancel_of_the_unknown() -> None:
    assert make().cancel("nobody") is None


# -- features -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ([SamplingParams()], Features()),
        ([SamplingParams(top_k=5, top_p=0.5)], Features()),
        ([SamplingParams(logprobs=True)], Features(logprobs=True)),
        ([SamplingParams(do_sample=True)], Features(sampling=True)),
        (
            [SamplingParams(do_sample=True, top_k=9), SamplingParams()],
            Features(sampling=True, candidates=64, top_k=64),
        ),
        (
            [SamplingParams(do_sample=True, top_k=9), SamplingParams(do_sample=True, top_k=900)],
            Features(sampling=True, candidates=1024, top_k=1024),
        ),
        (
            [SamplingParams(do_sample=True, top_k=900), SamplingParams(do_sample=True, top_p=0.5)],
            Features(sampling=True, candidates=-1, top_k=1024),
        ),
    ],
    ids=str,
)
def test_features_are_what_any_row_needs(params: list[SamplingParams], expected: Features) -> None:
    scheduler = make()
    for name, sampling in zip("abc", params, strict=False):
        scheduler.add(request(name, sampling=sampling))
    prefill, decode = step(scheduler)[0], step(scheduler)[0]
    assert prefill.features == decode.features == expected


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_minimum_length_is_asked_for_as_long_as_it_lasts(depth: int) -> None:
    scheduler = make()
    scheduler.add(request("a", new=6, min_new_tokens=3, eos_token_ids=(EOS,)))
    _, plans = run(scheduler, depth)
    assert [plan.features.min_length for plan in plans] == [True] * 3 + [False] * 3


def test_a_piece_that_samples_nothing_needs_nothing() -> None:
    scheduler = make(max_batch_tokens=4)
    scheduler.add(request("a", prompt=8, sampling=SamplingParams(do_sample=True, top_k=3, logprobs=True)))
    assert step(scheduler)[0].features == Features()
    assert step(scheduler)[0].features == Features(sampling=True, candidates=64, logprobs=True, top_k=64)


# -- everything at once -------------------------------------------------------------------------------------------


@dataclass
class Device:
    """The row tables of a device, and which token stands in which slot of which page."""

    page_size: int
    lengths: dict[int, int] = field(default_factory=dict)
    tables: dict[int, dict[int, int]] = field(default_factory=dict)
    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    owners: dict[int, Request] = field(default_factory=dict)

    def run(self, plan: Plan) -> Result:
        """A step, whose tokens follow from what stands in the pages of a row."""
        for row, owner, start, *_ in plan.new_rows:
            self.lengths[row], self.tables[row], self.owners[row] = start, {}, owner
        for row, index, page in plan.new_pages:
            assert index == len(self.tables[row]), "pages come in order"
            self.tables[row][index] = page
        sampled = []
        pieces = [(row, (self.last[row],), True) for row in plan.decode_rows if row in self.last]
        for row, tokens, samples in [*pieces, *plan.chunks]:
            for token in tokens:
                position = self.lengths[row]
                page = self.tables[row][position // self.page_size]
                self.slots[page, position % self.page_size] = token
                self.lengths[row] += 1
            if samples:
                sampled.append(row)
        read = sum(self.lengths[row] for row, *_ in [*pieces, *plan.chunks])
        assert plan.context_tokens == read, "the context that a step is said to read"
        for row in sampled:
            content = [
                self.slots[self.tables[row][i // self.page_size], i % self.page_size] for i in range(self.lengths[row])
            ]
            self.last[row] = next_token(content)
        assert len(sampled) == plan.num_sampled
        return Result(plan.step, [self.last[row] for row in sampled])


def next_token(content: list[int]) -> int:
    return hash(tuple(content)) % 23


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_gives_every_request_its_own_tokens(depth: int, seed: int) -> None:
    rng = random.Random(seed)
    sizes = {"num_pages": rng.randint(6, 14), "page_size": rng.choice([1, 2, 4]), "max_rows": rng.randint(1, 6)}
    scheduler = make(**sizes, max_batch_tokens=rng.randint(6, 12))
    device = Device(sizes["page_size"])
    capacity = sizes["num_pages"] * sizes["page_size"]
    requests: dict[str, Request] = {}
    got: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}
    flying: deque[tuple[Plan, Result]] = deque()
    while len(requests) < 15 or scheduler.has_live or flying:
        if len(requests) < 15 and rng.random() < 0.5:
            prompt = rng.randint(1, min(9, capacity - 1))
            new = rng.randint(1, min(12, capacity - prompt))
            one = Request(str(len(requests)), tuple(rng.choices(range(23), k=prompt)), new, 0, (EOS,))
            requests[one.request_id] = one
            scheduler.add(one)
        emissions = []
        if requests and rng.random() < 0.03:
            ended = scheduler.cancel(rng.choice(list(requests)))
            emissions += [ended] if ended is not None else []
        plan = scheduler.plan()
        scheduler.check_invariants()
        if plan is not None:
            assert plan.num_tokens <= scheduler.max_batch_tokens
            assert len(plan.new_pages) <= sizes["num_pages"], "a step's buffers hold no more"
            flying.append((plan, device.run(plan)))
        if flying and (plan is None or len(flying) >= depth):
            emissions += scheduler.complete(flying.popleft()[1])
            scheduler.check_invariants()
        for request_id, token, _, reason in emissions:
            assert request_id not in reasons, "news after the end"
            got.setdefault(request_id, []).extend([] if token is None else [token])
            if reason is not None:
                reasons[request_id] = reason
    for request_id, one in requests.items():
        tokens = list(one.prompt)
        while len(tokens) < len(one.prompt) + one.max_new_tokens and tokens[len(one.prompt) :][-1:] != [EOS]:
            tokens.append(next_token(tokens))
        want = tokens[len(one.prompt) :]
        if reasons[request_id] == "cancelled":
            want = want[: len(got[request_id])]
        assert got[request_id] == want
    assert scheduler.pages.in_use == scheduler.rows.in_use == 0


# -- no torch -----------------------------------------------------------------------------------------------------


def test_scheduling_imports_no_torch() -> None:
    """The package itself does; the files of the policy, taken alone, do not, and they need only each other."""
    root = Path(hf_async_batching.__file__).parent
    files = [file for room in ("core", "kv_cache", "scheduler") for file in sorted((root / room).glob("*.py"))]
    names = [".".join(file.relative_to(root).with_suffix("").parts) for file in files if file.stem != "__init__"]
    for holds_tensors in ("kv_cache.lazy_zeros", "kv_cache.paged_cache", "kv_cache.state_tables"):
        names.remove(holds_tensors)
    assert len(names) > 20
    code = (
        "import importlib, sys, types\n"
        "package = types.ModuleType('hf_async_batching')\n"
        f"package.__path__ = [{str(root)!r}]\n"
        "sys.modules['hf_async_batching'] = package\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module('hf_async_batching.' + name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_row_without_a_token_ends_and_others_go_on() -> None:
    scheduler = make()
    scheduler.add(request("a"))
    scheduler.add(request("b"))
    step(scheduler, 50, 51)
    plan = planned(scheduler)
    ahead = planned(scheduler)
    assert [e[:2] for e in settle(scheduler, plan, UNDRAWABLE, 52)] == [("b", 52)]
    assert scheduler.undrawable == ["a"]
    assert state_of(scheduler, "a") is State.FINISHED
    assert [e[:2] for e in settle(scheduler, ahead, UNDRAWABLE, 53)] == [("b", 53)], "a surplus one"
    assert scheduler.undrawable == ["a"]
    assert scheduler.pages.prefixes.find(None, request("a", prompt=9).prompt).depth == 0


def test_those_that_wait_for_choosers_make_way_while_others_wait() -> None:
    """One after the other, also where some that wait have made way themselves; not for these alone."""
    scheduler = make(max_rows=2)
    for name in "ab":
        scheduler.add(request(name, chooser=print))
    step(scheduler)
    assert not scheduler.make_way(), "no other waits"
    scheduler.add(request("c"))
    assert scheduler.make_way()
    assert state_of(scheduler, "b") is State.WAITING
    assert scheduler.make_way(), "b waits too, and c still does"
    assert state_of(scheduler, "a") is State.WAITING
    scheduler.cancel("c")
    assert not scheduler.make_way(), "a and b wait for their choosers"


def test_none_makes_way_that_waits_for_no_chooser() -> None:
    scheduler = make(max_rows=1)
    assert (scheduler.preemptions, scheduler.finished) == (0, 0)
    scheduler.add(request("a"))
    step(scheduler)
    scheduler.add(request("b"))
    assert not scheduler.make_way()
    assert scheduler.preemptions == 0


def test_the_head_of_the_queue_gets_a_row_where_no_chooser_can_go_on() -> None:
    """Its group waits for it; the youngest of another group makes way, and only where nothing else can happen."""
    scheduler = make(max_rows=3, max_batch_tokens=6)
    for name, group in (("a", "one"), ("b", "two"), ("c", "one"), ("d", "one"), ("e", "two")):
        scheduler.add(request(name, new=2, chooser=print, group=group))
    first, second = planned(scheduler), planned(scheduler)
    assert (started(first), started(second)) == (["a", "b"], ["c"])
    for plan in (first, second):
        assert scheduler.plan() is None and scheduler.preemptions == 0, "a step is in flight"
        settle(scheduler, plan)
    third = planned(scheduler)
    assert (started(third), scheduler.preemptions) == (["d"], 1)
    assert [state_of(scheduler, name) for name in "abc"] == [State.DECODING, State.WAITING, State.DECODING]
    settle(scheduler, third)
    assert scheduler.plan() is None and scheduler.preemptions == 1, "the first group has all its logits"
    for name in "acd":
        assert scheduler.choose(name, 60) is None
    assert planned(scheduler).decode_rows == (1, 3, 2)


def test_a_chooser_of_one_row_waits_for_no_other() -> None:
    """It can go on, so it does not make way, whatever waits for its row."""
    scheduler = make(max_rows=1)
    scheduler.add(request("a", chooser=print))
    scheduler.add(request("b"))
    step(scheduler)
    assert scheduler.plan() is None
    assert not scheduler._unblock(), "there is nothing to plan again for"
    assert scheduler.preemptions == 0


def test_any_row_makes_way_for_a_head_without_a_group() -> None:
    scheduler = make(max_rows=2)
    for name in "ab":
        scheduler.add(request(name, chooser=print, group="one" if name == "a" else "two"))
    scheduler.add(request("c", chooser=print, group="one"))
    scheduler.add(request("d", chooser=print, group="two"))
    step(scheduler)
    scheduler.cancel("c")
    scheduler.cancel("d")
    scheduler.add(request("e"))
    assert scheduler.plan() is None, "each group has all its logits"
    scheduler.add(request("f", chooser=print, group="one"))
    scheduler.add(request("g", chooser=print, group="two"))
    assert started(planned(scheduler)) == ["e"]
    assert [state_of(scheduler, name) for name in "ab"] == [State.DECODING, State.WAITING]


def test_a_chooser_chooses_the_last_token_too() -> None:
    scheduler = make()
    scheduler.add(request("a", new=3, chooser=print))
    assert not scheduler.waits_outside
    assert scheduler.choose("a", 60) is None and scheduler.choose("z", 60) is None, "nothing was offered"
    step(scheduler)
    assert scheduler.waits_outside and list(scheduler.offered) == ["a"]
    assert scheduler.plan() is None
    assert scheduler.choose("a", 60) is None
    assert scheduler.choose("a", 61) is None, "it has chosen"
    assert not scheduler.waits_outside
    plan, _ = step(scheduler)
    assert [(given.row, given.token) for given in plan.given] == [(1, 60)]
    assert scheduler.choose("a", 62) is None
    plan, _ = step(scheduler)
    assert [(given.row, given.token) for given in plan.given] == [(1, 62)], "each is given once"
    assert scheduler.choose("a", 63) == TokenOutput("a", None, None, "length")
    assert not scheduler.has_live and scheduler.pages.in_use == 0


def test_a_cancelled_request_gets_nothing_of_the_steps_in_flight() -> None:
    """Also where the steps before were all alike, and were settled the short way."""
    scheduler = make()
    for name in "ab":
        scheduler.add(request(name, new=12))
    for _ in range(5):
        step(scheduler)
    plan, ahead = planned(scheduler), planned(scheduler)
    assert scheduler.cancel("a") == TokenOutput("a", None, None, "cancelled")
    assert settle(scheduler, plan, 60, 61) == [TokenOutput("b", 61)]
    assert settle(scheduler, ahead, 62, 63) == [TokenOutput("b", 63)]


def test_a_new_request_with_a_chooser_waits_for_room_as_any_other() -> None:
    scheduler = make(max_rows=1)
    for name in "ab":
        scheduler.add(request(name, chooser=print))
    step(scheduler)
    assert scheduler.make_way(), "b has no logits yet"
    assert started(step(scheduler)[0]) == ["b"]
    assert not scheduler.make_way(), "a waits for its chooser"


def test_a_sequence_that_made_way_is_computed_again_with_its_choice() -> None:
    """In pieces, so that it does not decode at once."""
    scheduler = make(max_rows=1, max_batch_tokens=2)
    scheduler.add(request("a", chooser=print))
    step(scheduler)
    step(scheduler)
    scheduler.add(request("b", prompt=1, new=1))
    assert scheduler.make_way()
    assert scheduler.choose("a", 60) is None
    assert scheduler.cancel("b") is not None
    assert [step(scheduler)[0].chunks[0].tokens for _ in range(2)] == [(1000, 1001), (1002, 60)]
    assert scheduler.waits_outside


def test_there_is_room_where_a_row_is_free_and_none_waits_for_it() -> None:
    scheduler = make(max_rows=2)
    assert scheduler.has_room
    scheduler.add(request("a"))
    assert not scheduler.has_room, "it waits until the next step"
    step(scheduler)
    assert scheduler.has_room and (scheduler.num_running, scheduler.num_waiting) == (1, 0)
    scheduler.add(request("b"))
    step(scheduler)
    assert not scheduler.has_room
    scheduler.cancel("a")
    assert scheduler.has_room


def test_requests_that_have_ended_are_let_go_of() -> None:
    class Opaque:
        pass

    scheduler, given = make(), Opaque()
    kept = weakref.ref(given)
    scheduler.add(request("a", new=3, prompt_embeddings=given))
    del given
    while scheduler.has_live:
        scheduler.let_go()  # while it is live, nothing happens
        step(scheduler)
    assert kept() is not None, "a step's lists are kept for the next one"
    scheduler.let_go()
    gc.collect()
    assert kept() is None


def test_every_row_without_a_token_ends() -> None:
    """One behind a row that has a token, or that ended before, too."""
    scheduler = make()
    for name in "abc":
        scheduler.add(request(name))
    step(scheduler)
    plan = planned(scheduler)
    scheduler.cancel("a")
    assert [e[:2] for e in settle(scheduler, plan, UNDRAWABLE, 52, UNDRAWABLE)] == [("b", 52)]
    assert scheduler.undrawable == ["c"]
    assert state_of(scheduler, "c") is State.FINISHED


@pytest.mark.parametrize("outcome", [50, UNDRAWABLE, UNDRAWABLE_UNSOUND, FIRST_UNSOUND - 50])
def test_pages_of_unsound_logits_are_found_by_no_other(outcome: int) -> None:
    """Nor those that it shares, or what another that shares them enters later."""
    scheduler = make(max_batch_tokens=24, num_pages=32)
    prompt = request("a", prompt=9).prompt
    for name, new in (("first", 6), ("second", 12)):
        scheduler.add(Request(name, prompt, new))
        step(scheduler, *[50] * (1 if name == "first" else 2))
    plan = planned(scheduler)
    settle(scheduler, plan, outcome, 51)
    sound = outcome in (50, UNDRAWABLE)
    assert scheduler.pages.prefixes.find(None, prompt).depth == (2 if sound else 0)
    while scheduler.has_live:
        step(scheduler)
    assert scheduler.pages.prefixes.find(None, prompt).depth == (2 if sound else 0)
    assert scheduler.pages.in_use == 0
    step_after = Request("third", prompt, 2)
    scheduler.add(step_after)
    plan, _ = step(scheduler)
    assert chunk_sizes(plan) == [(plan.chunks[0].row, 1 if sound else 9, True)]


def test_a_sequence_whose_beginning_was_unsound_never_enters_a_page() -> None:
    scheduler = make()
    scheduler.add(request("a", prompt=3, new=12))
    step(scheduler, FIRST_UNSOUND - 50)
    while scheduler.has_live:
        step(scheduler)
    assert scheduler.pages.prefixes.num_unheld == 0
