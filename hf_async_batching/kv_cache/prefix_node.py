"""A node of the tree of known pages."""

from __future__ import annotations


class Node:
    """A known page, or one known page of each group of layers.

    Attributes:
        pages: Numbers of the pages, one per group, 0 for an evicted page; empty for the root.
        tokens: The tokens of the pages.
        depth: Number of nodes on the path from the root, this one included.
        parent: The node that it continues; None for the root.
        weights: Version of the weights that computed it.
        known: False once its pages were evicted: nothing may be entered below it any more.
        children: The nodes that continue it, by their tokens.
        snapshot: Place of the states after its last token; 0 if none was kept (see `state_snapshots`).
    """

    __slots__ = ("children", "depth", "known", "pages", "parent", "snapshot", "tokens", "weights")

    def __init__(self, pages: list[int], tokens: tuple[int, ...], parent: Node | None, weights: int) -> None:
        self.pages = pages
        self.tokens = tokens
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.parent = parent
        self.weights = weights
        self.known = True
        self.snapshot = 0
        self.children: dict[tuple[int, ...], Node] = {}

    def path(self) -> list[int]:
        """The pages from the first node to this one; the pages of one node are together."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.depth:
            nodes.append(node)
            node = node.parent
        return [page for node in reversed(nodes) for page in node.pages]
