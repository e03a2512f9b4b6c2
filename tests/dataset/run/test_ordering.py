from __future__ import annotations

from hf_async_batching.core.request import Request
from hf_async_batching.dataset.rows.row import PreparedRow
from hf_async_batching.dataset.run.ordering import RowJob, RowOrdering


def jobs(index: int, prompt: list[int], new: int = 8, completions: int = 1) -> list[RowJob]:
    row = PreparedRow(index, prompt)
    return [RowJob(row, j, Request(f"{index}.{j}", tuple(prompt), new)) for j in range(completions)]


def order(admission: RowOrdering, count: int = 100) -> list[tuple[int, int]]:
    return [(job.row.index, job.completion) for job in admission.take(count)]


def test_longest_first() -> None:
    admission = RowOrdering(block=100, step_tokens=64)
    for index, length in enumerate([3, 200, 50, 900]):
        admission.add(jobs(index, [1] * length))
    admission.add(jobs(4, [1], new=400))
    assert len(admission) == 5
    assert order(admission, 2) == [(3, 0), (4, 0)]
    assert order(admission) == [(1, 0), (2, 0), (0, 0)]
    assert not admission


def test_shared_beginnings_follow_each_other() -> None:
    admission = RowOrdering(block=100, step_tokens=64)
    for index in range(6):
        admission.add(jobs(index, [[7, 8], [3, 4], [5, 6]][index % 3] * 20 + [index]))
    assert [index % 3 for index, _ in order(admission)] == [1, 1, 2, 2, 0, 0]


def test_earlier_blocks_go_first() -> None:
    admission = RowOrdering(block=2, step_tokens=64)
    for index, length in enumerate([3, 200, 50, 900]):
        admission.add(jobs(index, [1] * length))
    assert order(admission) == [(1, 0), (0, 0), (3, 0), (2, 0)]


def test_further_completions_wait_for_a_step_of_other_prompts() -> None:
    admission = RowOrdering(block=100, step_tokens=64)
    for index in range(4):
        admission.add(jobs(index, [index] * 40, completions=2))
    # The first prompt can be found once 64 tokens of others have been given.
    assert order(admission) == [(0, 0), (1, 0), (2, 0), (0, 1), (3, 0), (1, 1), (2, 1), (3, 1)]


def test_what_the_engine_lost_goes_first() -> None:
    admission = RowOrdering(block=100, step_tokens=64)
    (lost,) = jobs(0, [1])
    admission.add(jobs(1, [1] * 50))
    admission.add_again(lost)
    assert len(admission) == 2
    assert order(admission, 1) == [(0, 0)]
