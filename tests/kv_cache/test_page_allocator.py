"""Pools of ids: nothing is handed out twice, nothing is lost."""

from __future__ import annotations

import random

import pytest

from hf_async_batching.kv_cache.id_pool import IdPool
from hf_async_batching.kv_cache.page_allocator import PageAllocator
from hf_async_batching.kv_cache.prefix_node import Node


def test_every_id_once_and_never_zero() -> None:
    pool = IdPool(5, "row")
    assert (pool.available, pool.in_use) == (5, 0)
    first, rest = pool.take(2), pool.take(3)
    assert first is not None
    assert rest is not None
    assert sorted(first + rest) == [1, 2, 3, 4, 5]
    assert (pool.available, pool.in_use) == (0, 5)


def test_neighbours_come_first_in_ascending_order() -> None:
    pool = IdPool(9, "page")
    assert pool.take(4) == [1, 2, 3, 4]
    pool.release([3, 1, 2])
    assert pool.take(3) == [1, 2, 3]


def test_all_or_nothing() -> None:
    pool = IdPool(3, "page")
    assert pool.take(4) is None
    assert pool.available == 3
    assert pool.take(0) == []
    assert pool.take(3) == [1, 2, 3]
    assert pool.take(1) is None


@pytest.mark.parametrize("ids", [[1, 1], [2], [3], [0]])
def test_what_was_not_taken_cannot_come_back(ids: list[int]) -> None:
    pool = IdPool(3, "page")
    assert pool.take(1) == [1]
    with pytest.raises(RuntimeError, match=rf"page {ids[-1]} was released twice or never taken"):
        pool.release(ids)


def test_release_tells_the_observer() -> None:
    pool = IdPool(4, "row")
    seen: list[list[int]] = []
    pool.on_release = seen.append
    pool.take(4)
    pool.release(iter([2, 4]))
    pool.release([])
    assert [sorted(ids) for ids in seen] == [[2, 4]]


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row, got 0"):
        IdPool(0, "row")


def test_random_traffic_conserves_ids() -> None:
    rng = random.Random(0)
    pool = IdPool(20, "page")
    held: list[int] = []
    for _ in range(2000):
        if held and rng.random() < 0.5:
            back = rng.sample(held, rng.randint(1, len(held)))
            held = [i for i in held if i not in back]
            pool.release(back)
        else:
            got = pool.take(rng.randint(0, 8))
            assert (got is None) or not set(got) & set(held)
            held += got or []
        assert pool.in_use == len(held)
        assert len(set(held)) == len(held)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (160, 10)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert PageAllocator(4, 16).pages_for(tokens) == pages


# -- pages that are shared and kept ---------------------------------------------------------------------------------


def allocator(size: int = 4) -> tuple[PageAllocator, list[int]]:
    """A pool of pages of two tokens, and the pages whose contents it gave up, in order."""
    pool = PageAllocator(size, 2)
    gone: list[int] = []
    pool.on_release = gone.extend
    return pool, gone


def compute(pool: PageAllocator, tokens: list[int]) -> list[int]:
    """What a sequence does: share what is known, take the rest, enter its full pages. Returns its pages."""
    node = pool.prefixes.find(None, tokens)
    shared = node.path()
    pool.share(shared)
    own = pool.take(pool.pages_for(len(tokens)) - len(shared))
    assert own is not None
    pool.prefixes.enter(node, tokens, shared + own, len(tokens) // 2)
    return shared + own


def test_a_page_returns_when_its_last_holder_lets_go() -> None:
    pool, gone = allocator()
    first = compute(pool, [1, 2, 3, 4, 5])
    second = compute(pool, [1, 2, 3, 4, 6])
    assert first[:2] == second[:2]
    assert (pool.in_use, pool.available) == (4, 0)
    assert pool.take(1) is None
    pool.check_invariants(first + second)
    pool.release(first)
    assert (pool.in_use, pool.available, gone) == (3, 1, [3])
    pool.check_invariants(second)
    pool.release(second)
    assert (pool.in_use, pool.available) == (0, 4)
    assert gone == [3, 4], "pages that can be found again keep their contents"
    pool.check_invariants([])
    with pytest.raises(RuntimeError, match="page 1 was released twice or never taken"):
        pool.release([1])


def test_known_pages_are_taken_when_no_free_one_is_left() -> None:
    pool, gone = allocator()
    pool.release(compute(pool, [1, 2, 3, 4]))
    assert (pool.available, pool.prefixes.num_unheld, gone) == (4, 2, [])
    held = pool.take(2)
    assert (held, gone) == ([3, 4], []), "free pages first"
    assert pool.take(3) is None
    assert gone == [], "all or nothing"
    assert pool.take(1) == [2]
    assert gone == [2]
    pool.release([2])
    assert compute(pool, [1, 2, 3]) == [1, 2]
    assert pool.available == 0


def test_what_sharing_takes_from_what_is_available() -> None:
    pool, _ = allocator(6)
    held = compute(pool, [1, 2, 3, 4])
    other = compute(pool, [5, 6, 7, 8])
    pool.release(other)
    assert pool.num_held(held + other) == 2
    assert pool.are_own([]) and not pool.are_own(held)
    assert pool.num_coming_back(held) == 2
    pool.share(held[:1])
    assert pool.num_coming_back(held) == 1
    assert pool.num_coming_back([*held, held[0]]) == 2
    fresh = pool.take(1)
    assert fresh is not None and pool.are_own(fresh)
    pool.share(fresh)
    assert not pool.are_own(fresh), "two hold it"
    pool.share(other)
    assert (pool.available, pool.in_use) == (1, 5)


def test_other_weights_free_what_nobody_holds() -> None:
    pool, gone = allocator()
    held = compute(pool, [1, 2])
    pool.release(compute(pool, [3, 4]))
    pool.weights_updated()
    assert gone == [2]
    assert (pool.in_use, pool.available) == (1, 3)
    assert pool.prefixes.find(None, [1, 2, 3]).path() == []
    pool.release(held)
    assert gone == [2, 1]
    pool.check_invariants([])


def test_switched_off_nothing_is_kept() -> None:
    pool = PageAllocator(4, 2, prefix_cache=False)
    pool.release(compute(pool, [1, 2, 3, 4]))
    assert pool.prefixes.num_unheld == 0
    assert compute(pool, [1, 2, 3, 4]) == [1, 2]
    assert pool.prefixes.find(None, [1, 2, 3, 4]).path() == []


@pytest.mark.parametrize("seed", range(8))
def test_random_sharing_finds_only_what_was_written(seed: int) -> None:
    """Sequences come, grow and go in any order; a page holds what its finder's tokens say, or is not found."""
    rng = random.Random(seed)
    pool = PageAllocator(rng.randint(8, 24), 2)
    memory: dict[int, tuple[int, ...]] = {}

    def forget(pages: list[int]) -> None:
        for page in pages:
            memory.pop(page, None)

    pool.on_release = forget
    live: list[tuple[list[int], list[int], list[Node]]] = []
    hits = 0
    for _ in range(1500):
        kind = rng.random()
        if kind < 0.4:
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 9))]
            node = pool.prefixes.find(None, tokens)
            shared = node.path()
            hits += len(shared)
            assert [memory[page] for page in shared] == [tuple(tokens[: 2 * i + 2]) for i in range(len(shared))]
            if pool.pages_for(len(tokens)) - pool.num_held(shared) <= pool.available:
                pool.share(shared)
                own = pool.take(pool.pages_for(len(tokens)) - len(shared))
                assert own is not None
                live.append((tokens, shared + own, [node]))
        elif kind < 0.7 and live:
            tokens, pages, _ = rng.choice(live)
            tokens.append(rng.randrange(2))
            if pool.pages_for(len(tokens)) > len(pages):
                more = pool.take(1)
                if more is None:
                    tokens.pop()
                pages += more or []
        elif live:
            tokens, pages, _ = live.pop(rng.randrange(len(live)))
            pool.release(pages)
        for tokens, pages, nodes in live:
            if rng.random() < 0.4:
                full = len(tokens) // 2
                memory.update({pages[i]: tuple(tokens[: 2 * i + 2]) for i in range(full)})
                nodes.append(pool.prefixes.enter(nodes.pop(), tokens, pages, full))
        if rng.random() < 0.01:
            pool.weights_updated()
        pool.check_invariants([page for _, pages, _ in live for page in pages])
    for _, pages, _ in live:
        pool.release(pages)
    assert pool.in_use == 0
    assert pool.available == pool.size
    assert hits > 50
    assert pool.prefixes.evictions > 50
