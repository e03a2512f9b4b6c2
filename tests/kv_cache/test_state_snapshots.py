"""Places for snapshots: who has which, and which is given up first."""

from __future__ import annotations

import pytest

from hf_async_batching.kv_cache.prefix_node import Node
from hf_async_batching.kv_cache.state_snapshots import WORTH_A_COPY, WORTH_A_PIECE, SnapshotPool

ROOT = Node([], (), None, 0)


def nodes(count: int) -> list[Node]:
    return [Node([i + 1], (i,), ROOT, 0) for i in range(count)]


@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_snapshots_come_at_the_ends_of_pages(page_size: int) -> None:
    assert WORTH_A_COPY % page_size == WORTH_A_PIECE % page_size == 0


def test_a_place_belongs_to_a_node_after_it_was_taken() -> None:
    pool, (node,) = SnapshotPool(2), nodes(1)
    assert pool.size == 2
    place = pool.take()
    assert place == 1 and not node.snapshot
    pool.check_invariants([place])
    pool.attach(node, place)
    assert node.snapshot == 1
    pool.check_invariants([])
    with pytest.raises(AssertionError):
        pool.attach(node, 2)


def test_the_least_recently_used_is_given_up() -> None:
    pool, (a, b, c) = SnapshotPool(2), nodes(3)
    for node in (a, b):
        place = pool.take()
        assert place is not None
        pool.attach(node, place)
    pool.use(a)
    place = pool.take()
    assert place == 2 and (a.snapshot, b.snapshot) == (1, 0)
    pool.attach(c, place)
    assert pool.take() == 1 and not a.snapshot
    pool.check_invariants([1])


def test_places_without_a_node_are_not_given_up() -> None:
    pool = SnapshotPool(2)
    assert [pool.take(), pool.take(), pool.take()] == [1, 2, None]
    pool.give_back([1])
    assert pool.take() == 1
    pool.give_back([])
    with pytest.raises(RuntimeError, match="snapshot 2 was released twice"):
        pool.give_back([2, 2])


def test_nodes_lose_their_snapshots() -> None:
    pool, found = SnapshotPool(3), nodes(3)
    for node in found:
        place = pool.take()
        assert place is not None
        pool.attach(node, place)
    pool.drop(found[1])
    pool.drop(found[1])
    assert [node.snapshot for node in found] == [1, 0, 3]
    pool.check_invariants([])
    pool.clear()
    assert not any(node.snapshot for node in found)
    pool.check_invariants([])
    assert [pool.take() for _ in range(4)].count(None) == 1


@pytest.mark.parametrize("broken", ["lost", "held twice", "of another", "of a node that is gone"])
def test_broken_bookkeeping_is_seen(broken: str) -> None:
    pool, (node,) = SnapshotPool(3), nodes(1)
    pool.attach(node, pool.take() or 0)
    pending: list[int] = []
    if broken == "lost":
        pool.take()
    elif broken == "held twice":
        pending = [1]
    elif broken == "of another":
        node.snapshot = 2
    else:
        node.known = False
    with pytest.raises(AssertionError):
        pool.check_invariants(pending)
