"""Rows and pages of several sequences: who gets them, who shares them, and when they are free again."""

from __future__ import annotations

from typing import Any

import pytest

from hf_async_batching.core.plan import NewPage
from hf_async_batching.kv_cache.kv_cache_manager import KVCacheManager
from hf_async_batching.kv_cache.sequence_pages import SequencePages

TOKENS = list(range(10, 40))


def make(**changes: Any) -> KVCacheManager:
    sizes: dict[str, Any] = {"num_pages": 8, "page_size": 4, "max_rows": 3, **changes}
    return KVCacheManager(**sizes)


def start(manager: KVCacheManager, tokens: list[int], shareable: bool = True) -> tuple[SequencePages, int]:
    """A sequence that has its row and pages, and how many of its tokens stand in shared pages."""
    pages = SequencePages(shareable=shareable)
    manager.match_prefix(pages, tokens)
    shared = manager.shared_pages(pages)
    assert manager.can_allocate(len(tokens), shared)
    manager.allocate(pages, len(tokens), shared)
    return pages, manager.pages.room_in(len(shared))


def check(manager: KVCacheManager, *running: tuple[SequencePages, int]) -> None:
    manager.check_invariants(running)


def test_a_sequence_gets_a_row_and_pages_for_its_tokens() -> None:
    manager = make()
    pages = SequencePages()
    manager.match_prefix(pages, TOKENS[:9])
    assert manager.shared_pages(pages) == []
    assert manager.allocate(pages, 9, []) == [NewPage(1, 0, 1), NewPage(1, 1, 2), NewPage(1, 2, 3)]
    assert (pages.row, pages.ids) == (1, [1, 2, 3])
    assert (manager.rows.in_use, manager.pages.in_use) == (1, 3)
    check(manager, (pages, 0))


def test_full_pages_are_found_and_held_by_both() -> None:
    manager = make()
    first, _ = start(manager, TOKENS[:9])
    manager.cache_full_pages(first, TOKENS[:9], 9)
    second, known = start(manager, TOKENS[:11])
    assert (known, second.ids[:2]) == (8, first.ids[:2])
    assert second.ids[2] != first.ids[2], "a page that is not full is shared by no one"
    assert manager.pages.in_use == 4
    check(manager, (first, 9), (second, 8))
    manager.retire(first, -1)
    assert (manager.pages.in_use, manager.rows.in_use) == (3, 1)
    check(manager, (second, 8))


def test_pages_are_cached_as_far_as_they_are_written() -> None:
    manager = make()
    first, _ = start(manager, TOKENS[:13])
    manager.cache_full_pages(first, TOKENS[:13], 7)
    assert start(manager, TOKENS[:13])[1] == 4


def test_what_cannot_be_shared_is_neither_entered_nor_looked_up() -> None:
    manager = make(num_pages=16)
    embedded, _ = start(manager, TOKENS[:9], shareable=False)
    manager.cache_full_pages(embedded, TOKENS[:9], 9)
    plain, known = start(manager, TOKENS[:9])
    assert known == 0
    manager.cache_full_pages(plain, TOKENS[:9], 9)
    assert start(manager, TOKENS[:9], shareable=False)[1] == 0


def test_one_token_more_must_fit_than_is_known() -> None:
    manager = make(num_pages=2)
    assert manager.can_allocate(7, [])
    assert not manager.can_allocate(8, [])


def test_shared_pages_that_are_held_cost_nothing() -> None:
    manager = make(num_pages=4)
    first, _ = start(manager, TOKENS[:9])
    manager.cache_full_pages(first, TOKENS[:9], 9)
    second = SequencePages()
    manager.match_prefix(second, TOKENS[:10])
    shared = manager.shared_pages(second)
    assert manager.pages.available == 1
    assert manager.can_allocate(10, shared)
    assert not manager.can_allocate(12, shared)
    manager.retire(first, -1)
    assert manager.pages.available == 4
    assert manager.can_allocate(15, shared), "two known pages without a holder are available, and are taken"
    assert not manager.can_allocate(16, shared)


def test_retired_pages_and_rows_wait_for_the_last_step_that_may_touch_them() -> None:
    manager = make()
    pages, _ = start(manager, TOKENS[:5])
    manager.retire(pages, 4)
    assert (pages.row, pages.ids) == (0, [])
    assert manager.num_coming_back == 2
    for step in range(4):
        manager.complete(step)
        assert (manager.pages.in_use, manager.rows.in_use) == (2, 1)
        check(manager)
    manager.complete(4)
    assert (manager.pages.in_use, manager.rows.in_use, manager.num_coming_back) == (0, 0, 0)
    check(manager)


def test_what_is_retired_after_its_last_step_is_free_at_once() -> None:
    manager = make()
    pages, _ = start(manager, TOKENS[:5])
    manager.complete(3)
    manager.retire(pages, 3)
    assert (manager.pages.in_use, manager.rows.in_use) == (0, 0)


def test_a_shared_page_comes_back_with_its_last_holder() -> None:
    manager = make()
    first, _ = start(manager, TOKENS[:6])
    manager.cache_full_pages(first, TOKENS[:6], 6)
    second, _ = start(manager, TOKENS[:6])
    manager.retire(first, 0)
    assert manager.num_coming_back == 1, "the second still holds the other"
    manager.retire(second, 0)
    assert manager.num_coming_back == 3


def test_each_sequence_gets_a_page_of_every_group_or_none_gets_any() -> None:
    manager = make(num_pages=10, groups=2, full_attention_groups=1, window=8)
    first, _ = start(manager, TOKENS[:4])
    second, _ = start(manager, TOKENS[4:8])
    assert manager.extend_each([first, second]) == [
        NewPage(1, 2, 5),
        NewPage(1, 3, 6),
        NewPage(2, 2, 7),
        NewPage(2, 3, 8),
    ]
    assert manager.extend_each([first, second]) is None
    assert (len(first.ids), len(second.ids), manager.pages.available) == (4, 4, 2)
    assert manager.extend_each([second]) == [NewPage(2, 4, 9), NewPage(2, 5, 10)]
    check(manager, (first, 4), (second, 4))


def test_pages_up_to_a_length() -> None:
    manager = make(num_pages=3)
    pages, _ = start(manager, TOKENS[:4])
    assert manager.extend_to(pages, 4) == []
    assert manager.extend_to(pages, 13) is None
    assert pages.ids == [1]
    assert manager.extend_to(pages, 9) == [NewPage(1, 1, 2), NewPage(1, 2, 3)]


def test_pages_before_the_window_wait_for_the_steps_that_may_read_them() -> None:
    manager = make(window=4)
    pages, _ = start(manager, TOKENS[:13])
    manager.release_before_window(pages, 6, 0)
    assert pages.pages_before_window == 0, "the token at 6 sees position 3"
    assert not manager._retired
    manager.release_before_window(pages, 7, 0)
    assert (pages.pages_before_window, pages.ids[0]) == (1, 0)
    manager.release_before_window(pages, 8, 0)
    assert len(manager._retired) == 1, "a step that passes no page leaves nothing behind"
    assert manager.pages.in_use == 4
    check(manager, (pages, 7))
    manager.complete(0)
    assert manager.pages.in_use == 3
    check(manager, (pages, 7))
    assert manager.rows.in_use == 1, "the sequence goes on"


def test_a_sequence_starts_without_the_pages_before_its_window() -> None:
    manager = make(num_pages=20, groups=2, full_attention_groups=1, window=4)
    first, _ = start(manager, TOKENS[:13])
    manager.cache_full_pages(first, TOKENS[:13], 13)
    second, known = start(manager, TOKENS[:13])
    assert known == 12
    assert second.pages_before_window == 2, "the token at 12 sees position 9"
    assert second.ids[:6] == [first.ids[0], 0, first.ids[2], 0, first.ids[4], first.ids[5]]
    check(manager, (first, 13), (second, 12))


@pytest.mark.parametrize("num_pages", [9, 10])
def test_pages_before_the_window_cost_a_new_sequence_nothing(num_pages: int) -> None:
    manager = make(num_pages=num_pages, groups=2, full_attention_groups=1, window=4)
    first, _ = start(manager, TOKENS[:13])
    manager.cache_full_pages(first, TOKENS[:13], 13)
    second = SequencePages()
    manager.match_prefix(second, TOKENS[:13])
    assert manager.pages.available == num_pages - 8
    assert manager.can_allocate(13, manager.shared_pages(second)) == (num_pages == 10), "it lacks a page of each group"


def test_a_model_whose_layers_all_have_a_window_starts_with_all_known_pages() -> None:
    """They were found page by page: what is known has no gaps there, and no page is worth giving up early."""
    manager = make(window=4)
    first, _ = start(manager, TOKENS[:13])
    manager.cache_full_pages(first, TOKENS[:13], 13)
    second, known = start(manager, TOKENS[:13])
    assert (known, second.ids[:3], second.pages_before_window) == (12, first.ids[:3], 0)


def test_a_chain_with_gaps_is_not_made_known_again() -> None:
    manager = make(window=4, num_pages=6)
    pages, _ = start(manager, TOKENS[:13])
    manager.release_before_window(pages, 11, -1)
    assert pages.pages_before_window == 2
    manager.cache_full_pages(pages, TOKENS[:13], 12)
    fresh = SequencePages()
    manager.match_prefix(fresh, TOKENS[:13])
    assert manager.shared_pages(fresh) == []
    assert pages.last_node is not None
    assert pages.last_node.depth == 0


def test_a_chain_that_was_known_before_the_window_passed_goes_on() -> None:
    manager = make(window=4)
    pages, _ = start(manager, TOKENS[:17])
    manager.cache_full_pages(pages, TOKENS[:17], 8)
    manager.release_before_window(pages, 11, -1)
    manager.cache_full_pages(pages, TOKENS[:17], 16)
    assert pages.last_node is not None
    assert pages.last_node.depth == 4


def test_wrong_pages_are_found_by_no_other_and_not_made_known_again() -> None:
    manager = make(num_pages=20, max_rows=6)
    wrong, _ = start(manager, TOKENS[:9])
    manager.cache_full_pages(wrong, TOKENS[:9], 9)
    sharing, _ = start(manager, TOKENS[:13])
    unlike, _ = start(manager, [99, *TOKENS[:8]])
    manager.forget(wrong, [wrong, sharing, unlike])
    assert (wrong.shareable, sharing.shareable, unlike.shareable) == (False, False, True)
    manager.cache_full_pages(sharing, TOKENS[:13], 13)
    manager.cache_full_pages(unlike, [99, *TOKENS[:8]], 9)
    assert start(manager, TOKENS[:9])[1] == 0
    assert start(manager, [99, *TOKENS[:8]])[1] == 8


def test_a_sequence_that_was_never_looked_up_can_be_forgotten() -> None:
    manager, pages = make(), SequencePages()
    manager.forget(pages, [pages])
    assert not pages.shareable


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda manager, pages: pages.ids.append(8), "pages in != pages out"),
        (lambda manager, pages: setattr(pages, "row", 2) or manager.rows.take(1), "rows in != rows out"),
        (lambda manager, pages: setattr(pages, "row", 0), "padding row"),
        (lambda manager, pages: manager.cache_full_pages(pages, TOKENS, 8), "shared, or can be"),
        (lambda manager, pages: manager.pages.release([pages.ids.pop()]), "a token without a page"),
        (lambda manager, pages: manager.release_before_window(pages, 12, -1), "will be written was given back"),
    ],
)
def test_broken_bookkeeping_is_found(breaks: Any, message: str) -> None:
    manager = make(window=4)
    pages, _ = start(manager, TOKENS[:8])
    check(manager, (pages, 4))
    breaks(manager, pages)
    with pytest.raises(AssertionError, match=message):
        check(manager, (pages, 5))


def test_pages_before_the_window_do_not_count_as_a_use_of_the_prefix() -> None:
    """Prefixes that others used later are still evicted after this one."""
    manager = make(num_pages=40, groups=2, full_attention_groups=1, window=4)
    tokens = TOKENS[:13]
    first, second = (start(manager, tokens)[0] for _ in range(2))
    manager.release_before_window(first, 11, -1)
    for pages in (first, second):  # the second fills the first's gaps
        manager.cache_full_pages(pages, tokens, 12)
    manager.retire(first, -1)
    later, _ = start(manager, [99, *tokens])
    manager.cache_full_pages(later, [99, *tokens], 12)
    manager.retire(later, -1)
    unheld = manager.pages.prefixes._unheld
    before = list(unheld)
    manager.release_before_window(second, 11, -1)
    assert len(unheld) == len(before) + 2 and list(unheld)[: len(before)] == before
