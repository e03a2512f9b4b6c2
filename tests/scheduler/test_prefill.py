"""The bounds of a step on what starts in it, exactly at the bound; and which lists a change brings up to date."""

from __future__ import annotations

import pytest

from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.plan import Plan, Result
from hf_async_batching.core.request import Request
from hf_async_batching.scheduler.running import RunningSequences
from hf_async_batching.scheduler.scheduler import Scheduler
from hf_async_batching.scheduler.sequence import Sequence, State


def planned(scheduler: Scheduler) -> Plan:
    plan = scheduler.plan()
    assert plan is not None
    return plan


@pytest.mark.parametrize(("most", "starts"), [(9, [1, 1, 1]), (10, [2, 1]), (14, [2, 1]), (15, [3]), (None, [3])])
def test_new_rows_write_no_more_than_a_step_can_send(most: int | None, starts: list[int]) -> None:
    """Each of the three sends five words of padding to its row's history."""
    scheduler = Scheduler(num_pages=16, page_size=4, max_rows=4, max_batch_tokens=32, max_writes=most)
    for name in "abc":
        logits = LogitsParams(no_repeat_ngram_size=2)
        scheduler.add(Request(name, (ord(name), 2, 3), 6, padding=(0,) * 5, logits=logits))
    assert [len(planned(scheduler).new_rows) for _ in starts] == starts


@pytest.mark.parametrize("read", ["decoding", "prefilling", "drafters"])
def test_each_list_is_new_after_a_change(read: str) -> None:
    running = RunningSequences(with_drafters=True)
    one = Sequence(Request("a", (1, 2), 9, lookup_tokens=3), 0)
    one.state = State.PREFILLING if read == "prefilling" else State.DECODING
    running.add(one)
    assert getattr(running, read) == [one]
    running.remove(one)
    assert getattr(running, read) == []


def drafting(restarts: tuple[bool, ...]) -> Scheduler:
    """Running sequences that look drafts up, and which of them are about to compute one."""
    scheduler = Scheduler(num_pages=64, page_size=4, max_rows=4, max_batch_tokens=32, draft_rows=4)
    for name, again in zip("abc", restarts, strict=False):
        one = Sequence(Request(name, (1, 2), 9, lookup_tokens=3), 0)
        one.state, one.restarts = State.PREFILLING, again
        scheduler._running.add(one)
    return scheduler


@pytest.mark.parametrize("restarts", [(False, False), (True, False), (True, True)])
def test_one_draft_is_enough_not_to_spread(restarts: tuple[bool, ...]) -> None:
    assert drafting(restarts)._prefill._has_drafts() == any(restarts)


def test_drafts_of_a_step_add_at_most_64_positions() -> None:
    scheduler = Scheduler(num_pages=64, page_size=64, max_rows=4, max_batch_tokens=400, draft_rows=2)
    for name in "ab":
        scheduler.add(Request(name, (*range(5, 95), ord(name)), 90, lookup_tokens=40))
    scheduler.complete(Result(planned(scheduler).step, [5, 5]))
    assert [len(chunk.tokens) - 1 for chunk in planned(scheduler).chunks] == [40, 24]


def test_a_draft_and_the_token_before_it_fit_in_the_step() -> None:
    scheduler = Scheduler(num_pages=64, page_size=64, max_rows=4, max_batch_tokens=42, draft_rows=2)
    for name in "ab":
        scheduler.add(Request(name, (*range(5, 25), ord(name)), 90, lookup_tokens=30))
    scheduler.complete(Result(planned(scheduler).step, [5, 5]))
    assert [len(chunk.tokens) for chunk in planned(scheduler).chunks] == [22, 20]


def test_a_prompt_that_is_computed_again_is_counted_once() -> None:
    scheduler = Scheduler(num_pages=16, page_size=4, max_rows=4, max_batch_tokens=32)
    scheduler.add(Request("a", (1, 2, 3), 6))
    scheduler.complete(Result(planned(scheduler).step, [5]))
    (sequence,) = scheduler._running
    assert sequence.last_step == 0
    scheduler._preempt(sequence)
    assert len(planned(scheduler).new_rows) == 1
    assert scheduler.pages.prefixes.query_tokens == 3
