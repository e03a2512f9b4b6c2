"""The order of those that wait, prompts spread over steps, and waiting for a prefix that is being computed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support.toy_engine import ToyEngine, run_random_schedule, verify

from hf_async_batching.core import graph_buckets as step_sizes
from hf_async_batching.core.graph_buckets import SPREAD_TOKENS
from hf_async_batching.core.plan import Plan, Result
from hf_async_batching.core.request import Request
from hf_async_batching.kv_cache.prefix_cache import PrefixCache
from hf_async_batching.scheduler import waiting_queue as admission
from hf_async_batching.scheduler.scheduler import Scheduler
from hf_async_batching.scheduler.sequence import Sequence, State
from hf_async_batching.scheduler.waiting_queue import WORTH_WAITING, WaitingQueue, found_a_step_later, spread_budget


def sequence(arrival: int, prompt: int = 4, new: int = 8) -> Sequence:
    return Sequence(Request(str(arrival), tuple(range(prompt)), new), arrival)


def order(queue: WaitingQueue) -> list[int]:
    queue.check_invariants()
    return [waiting.arrival for waiting in queue]


def test_first_come_first_served() -> None:
    queue = WaitingQueue("fcfs", 2)
    for arrival in range(4):
        queue.add(sequence(arrival, new=10 * arrival + 1))
    assert order(queue) == [0, 1, 2, 3]
    first = next(iter(queue))
    queue.remove(first)
    assert order(queue) == [1, 2, 3]
    queue.put_back(first)
    assert order(queue) == [0, 1, 2, 3]
    assert len(queue) == 4


def test_the_longest_first_but_nobody_waits_for_a_later_block() -> None:
    queue = WaitingQueue("longest_first", 1)
    for arrival, new in enumerate((5, 9, 5, 1, 99, 100, 3)):
        queue.add(sequence(arrival, new=new))
    assert order(queue) == [1, 0, 2, 3, 5, 4, 6], "blocks of four"
    queue.remove(next(iter(queue)))
    preempted, another = sequence(7, new=1), sequence(8, new=1)
    queue.put_back(another)
    queue.put_back(preempted)
    assert order(queue) == [7, 8, 0, 2, 3, 5, 4, 6]
    queue.remove(another)
    queue.remove(next(waiting for waiting in queue if waiting.arrival == 3))
    assert order(queue) == [7, 0, 2, 5, 4, 6]
    for waiting in [*queue]:
        queue.remove(waiting)
    assert not queue


@pytest.mark.parametrize("name", ["fcfs", "longest_first"])
def test_a_queue_in_disorder_is_found(name: Any) -> None:
    queue = WaitingQueue(name, 4)
    queue.add(sequence(0, new=2))
    queue.add(sequence(1, new=1))
    queue._new.reverse()
    with pytest.raises(AssertionError, match="overtook"):
        queue.check_invariants()
    scheduler = Scheduler(num_pages=9, page_size=16, max_rows=4, max_batch_tokens=8, admission=name)
    scheduler._waiting = queue
    with pytest.raises(AssertionError, match="overtook"):
        scheduler.check_invariants()


# -- spreading ------------------------------------------------------------------------------------------------------


def running(arrival: int, left: int, prompt_left: int = 0) -> Sequence:
    """One that has `left` tokens to come, and so much of its prompt to compute."""
    made = sequence(arrival, prompt=600, new=left + 10)
    made.state = State.PREFILLING if prompt_left else State.DECODING
    if prompt_left:
        made.num_computed, made.max_length = 600 - prompt_left, 600 + left
    else:
        made.num_planned = 610
        made.num_computed = 609
    return made


def test_prompts_take_the_room_beside_what_decodes() -> None:
    decoding = [running(i, left=5000) for i in range(100)]
    waiting = [sequence(200, prompt=5000, new=10)]
    assert spread_budget(2000, decoding, waiting, room=164) == 164
    assert spread_budget(50, decoding, waiting, room=164) == 50
    assert spread_budget(2000, decoding, [], room=164) == 2000, "there are none"


def test_nobody_ends_after_the_one_that_ends_last() -> None:
    assert spread_budget(2000, [], [sequence(i, prompt=500, new=100) for i in range(8)], room=264) == 2000
    assert spread_budget(9000, [], [sequence(i, prompt=500, new=100) for i in range(8)], room=264) == 4000
    waiting = [sequence(0, prompt=900, new=1000), sequence(1, prompt=900, new=999), sequence(2, prompt=500, new=10)]
    assert spread_budget(2000, [], waiting, room=264) == 900, "900 in one step, 1,800 in two"
    assert spread_budget(2000, [running(5, left=1004)], waiting, room=264) == 300, "the sixth step is early enough"
    under_way = running(5, left=400, prompt_left=590)
    assert spread_budget(2000, [under_way], [], room=264) == 590, "it is the last"
    assert spread_budget(2000, [under_way, running(6, left=401)], [], room=264) == 295


def ends(sizes: list[tuple[int, int]], budget: int, real: list[int] | None = None) -> list[list[int]]:
    """Per request, the steps that computed its prompt and the one that brought its last token."""
    scheduler = Scheduler(
        num_pages=4000,
        page_size=16,
        max_rows=40,
        max_batch_tokens=budget,
        prefix_cache=False,
        admission="longest_first",
    )
    for i, (prompt, new) in enumerate(sizes):
        scheduler.add(Request(str(i), (3,) * prompt, new, eos_token_ids=(1,)))
    made, seen = [0] * len(sizes), [[] for _ in sizes]
    while scheduler.has_live:
        plan = scheduler.plan()
        assert plan is not None
        rows = {sequence.row: int(sequence.request_id) for sequence in scheduler._running}
        for chunk in plan.chunks:
            seen[rows[chunk.row]].append(plan.step)
        tokens = []
        for sampled in scheduler._in_flight[plan.step].sampled:
            made[int(sampled.request_id)] += 1
            stops = real is not None and made[int(sampled.request_id)] >= real[int(sampled.request_id)]
            tokens.append(1 if stops else 5)
        for emission in scheduler.complete(Result(plan.step, tokens, None)):
            if emission.finish_reason:
                seen[int(emission.request_id)].append(plan.step)
        scheduler.check_invariants()
    return seen


@pytest.mark.parametrize("seed", range(6))
def test_spreading_makes_no_run_longer(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    sizes = [(rng.randint(1, 400), rng.randint(1, 300)) for _ in range(40)]
    spread = ends(sizes, 1000)
    monkeypatch.setattr("hf_async_batching.scheduler.prefill.spread_budget", lambda budget, *_, **__: budget)
    at_once = ends(sizes, 1000)
    last = max(steps[-1] for steps in at_once)
    assert max(steps[-1] for steps in spread) <= last + 1
    # What it is for: a step does not compute more than it has room for if it need not.
    started = sorted(steps[0] for steps in spread)
    assert started[-1] > max(steps[0] for steps in at_once) + 10
    assert sum(len(steps) for steps in spread) > sum(len(steps) for steps in at_once)


def test_who_ends_early_holds_nobody_up() -> None:
    """`max_new_tokens` is what may come: prompts still fill what decode steps leave."""
    rng = random.Random(3)
    sizes = [(rng.randint(100, 400), rng.randint(200, 300)) for _ in range(40)]
    spread = ends(sizes, 512, real=[4] * 40)
    assert max(steps[-1] for steps in spread) <= sum(prompt for prompt, _ in sizes) / SPREAD_TOKENS + 8


def test_who_needs_a_row_first_is_not_spread() -> None:
    scheduler = Scheduler(num_pages=400, page_size=16, max_rows=2, max_batch_tokens=600, admission="longest_first")
    for i in range(3):
        scheduler.add(Request(str(i), (i,) * 300, 100 - 40 * i))
    plan = scheduler.plan()
    assert plan is not None
    assert plan.num_tokens == 600


@pytest.mark.parametrize(("rows", "padded"), [(8, 8), (30, 32)])
def test_rows_that_decode_take_of_the_room(rows: int, padded: int) -> None:
    scheduler = Scheduler(num_pages=4000, page_size=16, max_rows=40, max_batch_tokens=600, admission="longest_first")
    for i in range(rows):
        scheduler.add(Request(str(i), (i, 1), 5000))
    next_plan(scheduler)
    scheduler.add(Request("late", (7,) * 2000, 10))
    for _ in range(2):  # the second time its prompt is under way, in a row that does not decode
        plan = next_plan(scheduler)
        assert (len(plan.decode_rows), plan.num_tokens) == (rows, rows + SPREAD_TOKENS - 1 - padded)


def test_drafts_do_not_wait_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_sizes, "SPREAD_TOKENS", 8)
    scheduler = Scheduler(
        num_pages=400, page_size=16, max_rows=20, max_batch_tokens=400, admission="longest_first", draft_rows=20
    )
    for i in range(20):
        scheduler.add(Request(str(i), (3, 4) * 8, 200, lookup_tokens=4))
    drafting = 0
    for _ in range(30):
        plan = scheduler.plan()
        assert plan is not None
        if plan.drafts:
            drafting += 1
            assert len(plan.chunks) + len(plan.decode_rows) == 20, "all go on"
        scheduler.complete(Result(plan.step, [3 + i % 2 for i in range(plan.num_sampled)], None))
    assert drafting > 5


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("draft_rows", [0, 4])
def test_tokens_do_not_depend_on_it(depth: int, draft_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_sizes, "SPREAD_TOKENS", 6)
    monkeypatch.setattr(admission, "WORTH_WAITING", 4)
    preemptions = 0
    for seed in range(30):
        engine = ToyEngine(depth, seed, num_pages=10, admission="longest_first", draft_rows=draft_rows)
        verify(engine, run_random_schedule(engine, seed, num_requests=12, conversations=seed % 2 == 0))
        preemptions += engine.scheduler.preemptions
    assert preemptions > 10


# -- a prefix that is being computed ----------------------------------------------------------------------------------


def with_prompts(*prompts: tuple[int, ...], **changes: Any) -> tuple[Scheduler, list[list[str]]]:
    """A scheduler, and which requests started in each of its first three steps."""
    sizes = {"num_pages": 900, "page_size": 16, "max_rows": 8, "max_batch_tokens": 4000, **changes}
    scheduler = Scheduler(**sizes)
    for name, prompt in zip("abcdef", prompts, strict=False):
        scheduler.add(Request(name, prompt, 9))
    return scheduler, [[new.request.request_id for new in next_plan(scheduler).new_rows] for _ in range(3)]


def next_plan(scheduler: Scheduler) -> Plan:
    plan = scheduler.plan()
    assert plan is not None
    scheduler.complete(Result(plan.step, [50] * plan.num_sampled, None))
    scheduler.check_invariants()
    return plan


SHARED = tuple(range(WORTH_WAITING))


def test_who_shares_a_long_prefix_starts_when_it_can_be_found() -> None:
    scheduler, started = with_prompts((*SHARED, 1, 2), (*SHARED, 3, 4), (*SHARED, 5), (9, 9))
    assert started == [["a", "d"], ["b", "c"], []], "they keep their places, and hold nobody up"
    assert scheduler.pages.prefixes.hit_tokens == 2 * WORTH_WAITING


def test_only_so_many_are_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_async_batching.scheduler.prefill.MOST_PASSED", 2)
    _, started = with_prompts(*[(*SHARED, i) for i in range(3)], (9, 9))
    assert started == [["a"], ["b", "c", "d"], []]


def test_who_wants_what_a_later_piece_of_a_prompt_brings_waits_for_it() -> None:
    scheduler = Scheduler(num_pages=900, page_size=16, max_rows=8, max_batch_tokens=1000)
    scheduler.add(Request("a", (*range(1300), 1), 9))
    next_plan(scheduler)
    scheduler.add(Request("b", (*range(1300), 2), 9))
    assert not next_plan(scheduler).new_rows
    (started,) = next_plan(scheduler).new_rows
    assert started.start == 1296


def test_a_long_prompt_is_followed_to_where_they_part() -> None:
    _, started = with_prompts((*range(900), 1), (*range(900), 2), max_batch_tokens=300)
    assert started == [["a"], [], []]


@pytest.mark.parametrize(
    ("prompts", "changes"),
    [
        (((*SHARED, 1), (*SHARED, 2)), {"prefix_cache": False}),
        (((*SHARED[:-16], 1), (*SHARED[:-16], 2)), {}),
        (((*SHARED[:-1], 1, 2), (*SHARED[:-1], 3, 4)), {}),
        (((*SHARED, 1), (1, *SHARED)), {}),
        ((SHARED, SHARED), {}),
    ],
    ids=["no cache", "little is shared", "the last page differs", "nothing is shared", "its last token is left over"],
)
def test_who_would_find_little_does_not_wait(prompts: tuple[tuple[int, ...], ...], changes: dict[str, Any]) -> None:
    assert with_prompts(*prompts, **changes)[1][0] == ["a", "b"]


def test_what_is_known_already_does_not_count() -> None:
    """Both find the first 256 tokens, and share 16 more."""
    scheduler, _ = with_prompts((*SHARED, 1))
    for name in "xy":
        scheduler.add(Request(name, (*SHARED, *range(16), ord(name), *range(300)), 9))
    assert [new.request.request_id for new in next_plan(scheduler).new_rows] == ["x", "y"]


def test_what_stands_behind_something_else_is_not_the_same() -> None:
    scheduler, _ = with_prompts((*[1] * 64, 5), (*[2] * 64, 5))
    for head in (1, 2):
        scheduler.add(Request(f"behind {head}", (*[head] * 64, *range(300), head), 9))
    assert len(next_plan(scheduler).new_rows) == 2


def test_nobody_waits_for_embeddings_or_with_them() -> None:
    scheduler = Scheduler(num_pages=900, page_size=16, max_rows=8, max_batch_tokens=4000)
    for name, embeds in (("a", True), ("b", True), ("c", False)):
        vectors = torch.zeros(400, 2) if embeds else None
        scheduler.add(Request(name, (0,) * 400, 9, prompt_embeddings=vectors))
    assert len(next_plan(scheduler).new_rows) == 3


def test_nobody_waits_for_pages_of_other_weights() -> None:
    scheduler = Scheduler(num_pages=900, page_size=16, max_rows=8, max_batch_tokens=WORTH_WAITING + 100)
    scheduler.add(Request("a", (*SHARED, *range(200)), 9))
    next_plan(scheduler)
    scheduler.weights_updated()
    scheduler.add(Request("b", (*SHARED, *range(200)), 9))
    assert [new.request.request_id for new in next_plan(scheduler).new_rows] == ["b"]


def test_a_request_waits_for_one_that_goes_on_from_the_same_pages() -> None:
    """However far the other has come; not for one that computes equal tokens behind other pages."""
    page, cache = 16, PrefixCache(16)
    tokens = tuple(range(3 * WORTH_WAITING))
    start = cache.enter(cache.find(None, tokens), tokens, [1, 2], 2)
    further = cache.enter(start, tokens, [1, 2, 3, 4, 5], 5)
    waits, computed = (Sequence(Request(name, tokens, 4), 0) for name in "ab")
    waits.pages.last_node = start
    reached = 2 * page + WORTH_WAITING
    for come, expected in ((reached - 1, False), (reached, True)):
        computed.num_computed, computed.pages.last_node = come, start
        assert found_a_step_later(waits, [computed], page) is expected
    computed.num_computed = 2 * WORTH_WAITING
    for own, expected in ((start, True), (further, True), (start.parent, False), (None, False)):
        computed.pages.last_node = own
        assert found_a_step_later(waits, [computed], page) is expected


def test_at_most_64_requests_wait_for_a_prefix() -> None:
    for waiting, starts in ((63, 2), (64, 1)):
        scheduler = Scheduler(num_pages=9000, page_size=16, max_rows=80, max_batch_tokens=4000)
        for i in range(1 + waiting):
            scheduler.add(Request(f"shared {i}", (*SHARED, i), 9))
        scheduler.add(Request("other", (9, 9), 9))
        assert len(next_plan(scheduler).new_rows) == starts
