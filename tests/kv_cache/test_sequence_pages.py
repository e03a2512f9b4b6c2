"""The pages of one sequence."""

from __future__ import annotations

import pytest

from hf_async_batching.core.plan import NewPage
from hf_async_batching.kv_cache.sequence_pages import SequencePages


def test_appended_pages_get_the_ordinals_behind_those_that_are_there() -> None:
    pages = SequencePages(row=3, ids=[7, 0])
    assert pages.append([9, 4]) == [NewPage(3, 2, 9), NewPage(3, 3, 4)]
    assert pages.ids == [7, 0, 9, 4]
    assert pages.append([]) == []


@pytest.mark.parametrize(
    ("groups", "full", "ids", "dropped", "left"),
    [
        (1, 0, [1, 2, 3], [1, 2], [0, 0, 3]),
        (2, 1, [1, 2, 3, 4, 5, 6], [2, 4], [1, 0, 3, 0, 5, 6]),
        (3, 1, [*range(1, 10)], [2, 3, 5, 6], [1, 0, 0, 4, 0, 0, 7, 8, 9]),
        (3, 2, [*range(1, 10)], [3, 6], [1, 2, 0, 4, 5, 0, 7, 8, 9]),
    ],
)
def test_pages_before_the_window_go_and_the_others_keep_their_places(
    groups: int, full: int, ids: list[int], dropped: list[int], left: list[int]
) -> None:
    pages = SequencePages(row=1, ids=ids)
    assert pages.drop_before_window(2, groups, full) == dropped
    assert (pages.ids, pages.pages_before_window) == (left, 2)
    assert pages.drop_before_window(2, groups, full) == [], "they have gone before"


def test_only_new_pages_before_the_window_go() -> None:
    pages = SequencePages(row=1, ids=[1, 2, 3, 4])
    assert pages.drop_before_window(1, 1, 0) == [1]
    assert pages.drop_before_window(3, 1, 0) == [2, 3]
    assert pages.ids == [0, 0, 0, 4]


def test_clearing_leaves_out_pages_that_went_before() -> None:
    pages = SequencePages(row=2, ids=[5, 6, 7])
    pages.drop_before_window(1, 1, 0)
    assert pages.clear() == [6, 7]
    assert (pages.row, pages.ids, pages.pages_before_window) == (0, [], 0)


def test_two_sequences_share_no_list() -> None:
    first, second = SequencePages(), SequencePages()
    first.append([1])
    assert second.ids == []
