"""The bounds of a step on what starts in it, exactly at the bound; and which lists a change brings up to date."""

from __future__ import annotations

import pytest

from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.plan import Plan
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
