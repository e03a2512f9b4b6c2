"""The KV pages of one sequence, and its place among known pages. Integers only."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from hf_async_batching.core.plan import NewPage
from hf_async_batching.kv_cache.prefix_node import Node

# Makes a `NewPage` without calling its constructor, which takes longer than all other work on a new page.
_new_page = partial(tuple.__new__, NewPage)


class PendingSnapshot(NamedTuple):
    """A snapshot that is planned, and whose node in the prefix cache does not exist yet.

    Attributes:
        position: Number of tokens after which it holds the states.
        place: Its place.
        replaces: Whether it makes the sequence's last such snapshot superfluous.
    """

    position: int
    place: int
    replaces: bool


@dataclass(slots=True, eq=False)
class SequencePages:
    """The row and the KV pages of one sequence.

    Attributes:
        row: Its row in the device's page table; 0 while it has none.
        ids: Its pages in order of position, with the pages of all groups of layers together; 0 for a released page.
        pages_before_window: Pages per group released because they lie before the attention window.
        matched_node: Result of the last look-up in the prefix cache, from which the next one continues; None before
            the first.
        last_node: The last node of the sequence's own chain in the prefix cache: at first the usable part of
            `matched_node`, later the nodes that it entered itself. None before the first look-up.
        shareable: Whether the sequence's tokens determine the contents of its pages.
        borders: Positions in its prompt, in order, at which a snapshot of its states will be taken.
        last_snapshot: Position of its last snapshot, or of the snapshot that it began with.
        pending: Its snapshots without a node.
        replaceable: The node with its last snapshot that a later one replaces.
    """

    row: int = 0
    ids: list[int] = field(default_factory=list)
    pages_before_window: int = 0
    matched_node: Node | None = None
    last_node: Node | None = None
    shareable: bool = True
    borders: list[int] = field(default_factory=list)
    last_snapshot: int = 0
    pending: list[PendingSnapshot] = field(default_factory=list)
    replaceable: Node | None = None

    def append(self, ids: list[int]) -> list[NewPage]:
        """Add pages at the end.

        Returns:
            The entries of the device's page table that the next step must set.
        """
        row = self.row
        entries = [_new_page((row, ordinal, page)) for ordinal, page in enumerate(ids, len(self.ids))]
        self.ids += ids
        return entries

    def drop_before_window(self, count: int, groups: int, full_attention_groups: int) -> list[int]:
        """Remove the first `count` pages of each group with a window. The entries of these pages become 0.

        Args:
            count: Pages per group, including pages that were removed before.
            groups: Number of groups of layers.
            full_attention_groups: Number of leading groups that keep all pages.

        Returns:
            The pages that this call removed.
        """
        dropped: list[int] = []
        for start in range(self.pages_before_window * groups, count * groups, groups):
            windowed = slice(start + full_attention_groups, start + groups)
            dropped += self.ids[windowed]
            self.ids[windowed] = [0] * (groups - full_attention_groups)
        self.pages_before_window = count
        return dropped

    def clear(self) -> list[int]:
        """Remove all pages, and the row.

        Returns:
            The removed pages, without the zeros of pages released before.
        """
        ids = [page for page in self.ids if page] if self.pages_before_window else self.ids
        self.row = 0
        self.ids = []
        self.pages_before_window = 0
        return ids
