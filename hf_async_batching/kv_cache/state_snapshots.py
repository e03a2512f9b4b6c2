"""Record which place in the state tables holds the states after which tokens. Integers only.

Pages hold keys and values token by token, but a row's states are known after its last token alone. So a prompt can
start behind a known page only if a copy of the states was kept there: a *snapshot*. A snapshot belongs to a node of
the prefix tree, and holds the states after exactly these tokens. (Snapshots where requests part and where they end are
those that later requests find: Marconi, arXiv 2411.19379.)

Snapshots need no retirement: all copies and steps run in the order of their plans on one stream. A plan that
overwrites a snapshot comes after every plan that reads it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from hf_async_batching.kv_cache.id_pool import IdPool
from hf_async_batching.kv_cache.prefix_node import Node

WORTH_A_PIECE = 256
"""A prompt's snapshot makes a piece of the prompt end early, which costs a step. It must save this many tokens."""

WORTH_A_COPY = 64
"""Tokens between the snapshots of a row that decodes. A copy reads and writes 50 MB for a row of Qwen3.5-9B."""


class SnapshotPool:
    """The places for snapshots, and the order in which they are given up: the least recently used first.

    Args:
        size: Number of places, `1 .. size`.
    """

    def __init__(self, size: int) -> None:
        self._ids = IdPool(size, "snapshot")
        self._nodes: OrderedDict[int, Node] = OrderedDict()  # least recently used first

    @property
    def size(self) -> int:
        """Number of places."""
        return self._ids.size

    def take(self) -> int | None:
        """Take a place, which belongs to no node yet; None if every place is taken and belongs to no node."""
        if not self._ids.available:
            if not self._nodes:
                return None
            self.drop(next(iter(self._nodes.values())))
        taken = self._ids.take(1)
        assert taken is not None
        return taken[0]

    def give_back(self, places: Iterable[int]) -> None:
        """Give back places that belong to no node."""
        self._ids.release(places)

    def attach(self, node: Node, place: int) -> None:
        """Let a taken place be the snapshot of a node that has none."""
        assert not node.snapshot
        node.snapshot = place
        self._nodes[place] = node

    def use(self, node: Node) -> None:
        """Note that the snapshot of a node is used now."""
        self._nodes.move_to_end(node.snapshot)

    def drop(self, node: Node) -> None:
        """Give up the snapshot of a node, if it has one."""
        if node.snapshot:
            del self._nodes[node.snapshot]
            self._ids.release([node.snapshot])
            node.snapshot = 0

    def clear(self) -> None:
        """Give up the snapshots of all nodes."""
        for node in list(self._nodes.values()):
            self.drop(node)

    def check_invariants(self, pending: Iterable[int]) -> None:
        """Check that no place is lost, given every place that a sequence holds.

        Raises:
            AssertionError: The bookkeeping is broken.
        """
        places = [*self._nodes, *pending]
        assert len(places) == len(set(places)) == self._ids.in_use, "snapshots in != snapshots out"
        for place, node in self._nodes.items():
            assert node.known and node.snapshot == place, "a snapshot of a node that is not known"
