"""Numbers that are taken and given back."""

from __future__ import annotations

import pytest

from hf_async_batching.kv_cache.id_pool import IdPool


def test_a_pool_of_one() -> None:
    pool = IdPool(1, "row")
    assert (pool.available, pool.in_use) == (1, 0)
    assert pool.take(2) is None
    assert pool.take(1) == [1]
    assert (pool.available, pool.in_use, pool.take(1), pool.take(0)) == (0, 1, None, [])
    with pytest.raises(ValueError, match="at least one row, got 0"):
        IdPool(0, "row")


def test_the_lowest_are_taken_first() -> None:
    pool = IdPool(4, "page")
    assert pool.take(3) == [1, 2, 3]
    released: list[list[int]] = []
    pool.on_release = released.append
    pool.release([1, 3])
    pool.release([])
    assert released == [[3, 1]]
    assert pool.take(3) == [1, 3, 4]


@pytest.mark.parametrize("number", [0, 1, 4])
def test_only_what_was_taken_comes_back(number: int) -> None:
    pool = IdPool(4, "page")
    assert pool.take(4) == [1, 2, 3, 4]
    pool.release([4, 1])
    with pytest.raises(RuntimeError, match=f"page {number} was released twice or never taken"):
        pool.release([number])


def test_a_number_beyond_the_pool_is_not_known() -> None:
    with pytest.raises(IndexError):
        IdPool(4, "page").release([5])
