"""Pools of ids: nothing is handed out twice, nothing is lost."""

from __future__ import annotations

import random

import pytest

from hf_async_batching.pages import IdPool, PageAllocator


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
