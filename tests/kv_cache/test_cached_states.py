"""Sequences that start behind snapshots of states: where these are taken, who finds them, what makes them go."""

from __future__ import annotations

from typing import Any

import pytest

from hf_async_batching.core.plan import StateCopy
from hf_async_batching.kv_cache import kv_cache_manager
from hf_async_batching.kv_cache.kv_cache_manager import KVCacheManager
from hf_async_batching.kv_cache.sequence_pages import SequencePages

TOKENS = list(range(100, 140))
ROWS = 3


@pytest.fixture(autouse=True)
def two_pages_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache_manager, "WORTH_A_PIECE", 8)
    monkeypatch.setattr(kv_cache_manager, "WORTH_A_COPY", 8)


def make(**changes: Any) -> KVCacheManager:
    sizes: dict[str, Any] = {"num_pages": 40, "page_size": 4, "max_rows": ROWS, "snapshots": 6, **changes}
    return KVCacheManager(**sizes)


def place(number: int) -> int:
    """A snapshot's place in a plan."""
    return -number


class Run:
    """A sequence that has started."""

    def __init__(self, manager: KVCacheManager, tokens: list[int], shareable: bool = True) -> None:
        self.manager, self.tokens, self.pages = manager, tokens, SequencePages(shareable=shareable)
        manager.match_prefix(self.pages, tokens)
        shared = manager.shared_pages(self.pages)
        manager.allocate(self.pages, len(tokens), shared)
        self.start = manager.pages.room_in(len(shared))
        self.copy = manager.begin_states(self.pages, len(tokens))

    def compute(self, end: int | None = None) -> list[StateCopy]:
        """Compute the prompt up to `end`; returns the snapshots on the way."""
        end = len(self.tokens) if end is None else end
        copies: list[StateCopy] = []
        while self.pages.borders and self.pages.borders[0] < end:
            border = self.pages.borders[0]
            self.manager.cache_full_pages(self.pages, self.tokens, border)
            copy = self.manager.take_snapshot(self.pages, border)
            assert copy is not None
            copies.append(copy)
            self.manager.cache_full_pages(self.pages, self.tokens, border)
        self.manager.cache_full_pages(self.pages, self.tokens, end)
        return copies

    def decode(self, position: int) -> list[StateCopy]:
        """The snapshots that are taken when the token at `position` is next."""
        return self.manager.take_decode_snapshots([(self.pages, position)])

    def end(self) -> None:
        self.manager.retire(self.pages, -1)


def check(manager: KVCacheManager, *running: Run) -> None:
    manager.check_invariants((run.pages, len(run.tokens)) for run in running)


def taken(manager: KVCacheManager) -> int:
    assert manager.snapshots is not None
    return manager.snapshots._ids.in_use


def test_a_first_prompt_has_no_borders() -> None:
    manager = make()
    run = Run(manager, TOKENS[:21])
    assert (run.start, run.copy, run.pages.borders) == (0, None, [])
    assert manager.take_snapshot(run.pages, 8) is None
    run.compute()
    check(manager, run)


def test_known_pages_without_states_are_of_no_use() -> None:
    """A second prompt computes them again, and keeps the states where the prompts part, and at its own end."""
    manager = make()
    first = Run(manager, TOKENS[:13])
    first.compute()
    second = Run(manager, [*TOKENS[:12], *range(15)])
    assert (second.start, second.copy, second.pages.borders) == (0, None, [12, 24])
    assert not set(first.pages.ids) & set(second.pages.ids)
    assert manager.take_snapshot(second.pages, 8) is None, "no border"
    assert second.compute() == [StateCopy(2, place(1)), StateCopy(2, place(2))]
    third = Run(manager, [*TOKENS[:12], 7, 7])
    assert (third.start, third.copy) == (12, StateCopy(place(1), 3))
    assert third.pages.ids[:3] == first.pages.ids[:3]
    check(manager, first, second, third)
    for run in (first, second, third):
        run.end()
    again = Run(manager, [*TOKENS[:12], *range(15)])
    assert (again.start, again.copy) == (24, StateCopy(place(2), again.pages.row))
    check(manager, again)


def test_a_border_leaves_a_token_over_and_is_worth_a_piece() -> None:
    manager = make()
    Run(manager, TOKENS[:9]).compute()
    assert Run(manager, TOKENS[:16]).pages.borders == [8], "not 12, two pages further than nothing but one from 8"
    assert Run(manager, TOKENS[:17]).pages.borders == [8, 16]


def test_little_is_not_worth_a_piece() -> None:
    manager = make()
    Run(manager, TOKENS[:7]).compute()
    assert Run(manager, TOKENS[:8]).pages.borders == [], "4 tokens are known, and 4 more"
    assert Run(manager, TOKENS[:9]).pages.borders == [8], "from nothing"


def test_borders_are_measured_from_where_a_sequence_starts() -> None:
    manager = make()
    Run(manager, TOKENS[:9]).compute()
    Run(manager, TOKENS[:9]).compute()
    manager.retire(SequencePages(row=0), -1)
    third = Run(manager, TOKENS[:15])
    assert (third.start, third.pages.last_snapshot, third.pages.borders) == (8, 8, [])
    third.end()
    assert Run(manager, TOKENS[:17]).pages.borders == [16]


def test_a_snapshot_that_another_sequence_took_first_stays() -> None:
    """It is not taken again; or taken for nothing, if both are under way."""
    manager = make()
    first = Run(manager, TOKENS[:13])
    first.compute()
    second, third = (Run(manager, TOKENS[:14]) for _ in range(2))
    assert second.pages.borders == third.pages.borders == [12]
    assert first.decode(12) == [StateCopy(1, place(1))]
    assert second.compute() == [StateCopy(2, place(2))]
    manager.cache_full_pages(third.pages, third.tokens, 12)
    assert manager.take_snapshot(third.pages, 12) is None
    assert (third.pages.borders, third.pages.pending, third.pages.last_snapshot) == ([], [], 12)
    assert taken(manager) == 2
    manager.cache_full_pages(first.pages, first.tokens, 13)
    assert taken(manager) == 1
    check(manager, first, second, third)


# -- rows that decode -------------------------------------------------------------------------------------------------


def test_rows_that_decode_keep_their_last_snapshot_only() -> None:
    manager = make()
    run = Run(manager, TOKENS[:7])
    run.compute()
    run.tokens = TOKENS
    manager.extend_to(run.pages, len(TOKENS))
    assert run.decode(4) == []
    for position, number in ((8, 1), (16, 2), (24, 1), (32, 2)):
        assert run.decode(position) == [StateCopy(1, place(number))]
        assert run.decode(position + 4) == [], "so soon"
        assert taken(manager) <= 2
        manager.cache_full_pages(run.pages, run.tokens, position + 1)
        assert taken(manager) == 1
    check(manager, run)
    run.end()
    later = Run(manager, TOKENS)
    assert (later.start, later.copy) == (32, StateCopy(place(2), 1))
    check(manager, later)


def test_a_snapshot_counts_once_its_tokens_are_known() -> None:
    """The request may have ended before: then the row's states were not what the host believed."""
    manager = make()
    run = Run(manager, TOKENS[:7])
    run.compute()
    run.tokens = TOKENS
    manager.extend_to(run.pages, 40)
    assert len(run.decode(8)) == len(run.decode(16)) == 1
    manager.cache_full_pages(run.pages, run.tokens, 15)
    assert taken(manager) == 2 and len(run.pages.pending) == 1
    check(manager, run)
    run.end()
    assert taken(manager) == 1
    assert not run.pages.pending
    check(manager)
    assert Run(manager, TOKENS[:30]).start == 8


def test_without_a_free_place_there_is_no_snapshot() -> None:
    manager = make(snapshots=2)
    run = Run(manager, TOKENS[:7])
    assert [len(run.decode(position)) for position in (8, 16, 24)] == [1, 1, 0]
    assert run.pages.last_snapshot == 16, "the next border is tried again"
    run.end()
    assert taken(manager) == 0


def test_a_sequence_that_comes_back_still_replaces_its_snapshot() -> None:
    manager = make()
    run = Run(manager, TOKENS[:7])
    run.tokens = TOKENS
    run.decode(8)
    manager.extend_to(run.pages, 40)
    manager.cache_full_pages(run.pages, run.tokens, 13)
    manager.retire(run.pages, -1)
    manager.match_prefix(run.pages, TOKENS)
    manager.allocate(run.pages, 40, manager.shared_pages(run.pages))
    assert manager.begin_states(run.pages, 40) == StateCopy(-1, 1)
    assert run.pages.last_snapshot == 8
    run.pages.borders.clear()
    run.decode(24)
    manager.cache_full_pages(run.pages, run.tokens, 30)
    assert taken(manager) == 1
    check(manager, run)


def test_what_others_went_on_from_is_kept() -> None:
    manager = make()
    run = Run(manager, TOKENS[:7])
    run.compute()
    run.tokens = TOKENS
    manager.extend_to(run.pages, 30)
    run.decode(8)
    manager.cache_full_pages(run.pages, run.tokens, 13)
    other = Run(manager, [*TOKENS[:8], *range(9)])
    assert other.start == 8
    other.compute()
    run.decode(16)
    manager.cache_full_pages(run.pages, run.tokens, 17)
    assert Run(manager, [*TOKENS[:8], 1, 2]).start == 8


def test_rows_that_decode_need_two_places_each() -> None:
    manager = make(snapshots=3)
    runs = [Run(manager, [i, *TOKENS[:6]]) for i in range(2)]
    assert manager.take_decode_snapshots([(run.pages, 8) for run in runs]) == []
    runs.pop().end()
    assert len(runs[0].decode(8)) == 1


# -- what makes snapshots go ------------------------------------------------------------------------------------------


def known(manager: KVCacheManager) -> None:
    """Twelve tokens with a snapshot after eight."""
    for _ in range(2):
        run = Run(manager, TOKENS[:9])
        run.compute()
        run.end()
    assert taken(manager) == 1


def test_evicted_pages_take_their_snapshots_along() -> None:
    manager = make(num_pages=4)
    known(manager)
    run = Run(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13])
    assert taken(manager) == 0
    check(manager, run)


def test_new_weights_drop_all_snapshots_and_those_under_way() -> None:
    manager = make()
    known(manager)
    run = Run(manager, TOKENS[:9])
    run.decode(16)
    assert taken(manager) == 2
    manager.pages.weights_updated()
    assert taken(manager) == 1
    run.tokens = TOKENS
    manager.extend_to(run.pages, 40)
    check(manager, run)
    assert run.decode(32) == [], "its states are partly old"
    manager.cache_full_pages(run.pages, run.tokens, 30)
    assert taken(manager) == 0
    check(manager, run)
    assert Run(manager, TOKENS).start == 0


def test_a_chain_that_is_forgotten_has_no_snapshots() -> None:
    manager = make()
    known(manager)
    run = Run(manager, TOKENS[:9])
    assert run.start == 8
    run.decode(16)
    manager.forget(run.pages, [run.pages])
    assert taken(manager) == 1
    assert run.decode(24) == []
    run.tokens = TOKENS
    manager.cache_full_pages(run.pages, run.tokens, 30)
    run.end()
    assert taken(manager) == 0
    check(manager)


def test_embeddings_have_no_snapshots() -> None:
    manager = make()
    known(manager)
    run = Run(manager, TOKENS[:20], shareable=False)
    assert (run.start, run.copy, run.pages.borders) == (0, None, [])
    assert run.decode(20) == []


def test_the_snapshot_that_is_used_stays_longest() -> None:
    manager = make(snapshots=2)
    for first in (0, 1):
        for _ in range(2):
            run = Run(manager, [first, *TOKENS[:8]])
            run.compute()
            run.end()
    Run(manager, [0, *TOKENS[:8]]).end()
    run = Run(manager, [5, *TOKENS[:8]])
    assert run.decode(8) == [StateCopy(run.pages.row, place(2))]
    run.end()
    assert [Run(manager, [first, *TOKENS[:8]]).start for first in (0, 1)] == [8, 0]


@pytest.mark.parametrize("changes", [{"snapshots": 0}, {"prefix_cache": False}], ids=str)
def test_without_a_prefix_cache_or_places(changes: dict[str, Any]) -> None:
    manager = make(**changes)
    assert manager.snapshots is None and not manager.pages.prefixes.enabled
    for _ in range(2):
        run = Run(manager, TOKENS[:20])
        assert (run.start, run.copy, run.pages.borders) == (0, None, [])
        run.compute()
        assert run.decode(20) == []
        check(manager, run)
        run.end()


def test_models_without_states_need_no_snapshots() -> None:
    manager = make(snapshots=None)
    Run(manager, TOKENS[:9]).compute()
    second = Run(manager, TOKENS[:20])
    assert (second.start, second.copy, second.pages.borders) == (8, None, [])


def test_a_window_and_the_states_must_both_be_known() -> None:
    manager = make(groups=2, full_attention_groups=1, window=5)
    known(manager)
    prefixes = manager.pages.prefixes
    node = prefixes.find(None, TOKENS)
    while not node.snapshot:
        assert node.parent is not None
        node = node.parent
    assert node.depth == 2 and prefixes.usable(node) is node
    manager.pages.prefixes._forget(node, 1)  # the page of the group with a window
    assert prefixes.usable(node).depth == 0


def test_lost_snapshots_are_seen() -> None:
    manager = make()
    run = Run(manager, TOKENS[:9])
    run.decode(8)
    run.pages.pending.clear()
    with pytest.raises(AssertionError, match="snapshots in"):
        check(manager, run)
