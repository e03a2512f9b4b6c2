"""Which full KV page holds which tokens, so that a prompt finds the pages that others have computed. Integers only.

Known pages form a tree: the path from the root to a page spells the tokens of the page and of all pages before it,
which with the weights are all that its keys and values depend on. A look-up compares tokens, never their hashes
alone, so that nothing is taken for something else. (Sharing pages of equal prefixes is SGLang's RadixAttention, at the
granularity of vLLM's automatic prefix caching.)

A page that nobody holds stays known until its memory is wanted. It is then given up least recently used first, where
using a page uses all pages before it, so that a page always goes before the one that it continues.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class Node:
    """A known page.

    Attributes:
        page: Number of the page; 0 for the root.
        tokens: Its tokens.
        depth: Pages on the path from the root, this one included.
        parent: The page before it; None for the root.
        weights: Version of the weights that computed it.
        known: False once its page was given up: nothing must be entered below it any more.
        children: The pages that continue it, by their tokens.
    """

    __slots__ = ("children", "depth", "known", "page", "parent", "tokens", "weights")

    def __init__(self, page: int, tokens: tuple[int, ...], parent: Node | None, weights: int) -> None:
        self.page = page
        self.tokens = tokens
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.parent = parent
        self.weights = weights
        self.known = True
        self.children: dict[tuple[int, ...], Node] = {}

    def path(self) -> list[int]:
        """The pages from the first one to this one."""
        pages = [0] * self.depth
        node: Node | None = self
        while node is not None and node.depth:
            pages[node.depth - 1] = node.page
            node = node.parent
        return pages


class PrefixCache:
    """The tree of known pages, and the order in which those that nobody holds are given up.

    It counts no references: its owner (`PageAllocator`) says when a page is held again or let go.

    Args:
        page_size: Tokens in a page.
        enabled: Where False, no page ever becomes known.

    Attributes:
        query_tokens: Prompt tokens that were looked up.
        hit_tokens: Those of them that were found.
        evictions: Known pages that were given up because their memory was wanted.
    """

    def __init__(self, page_size: int, enabled: bool = True) -> None:
        self.page_size = page_size
        self.enabled = enabled
        self.query_tokens = 0
        self.hit_tokens = 0
        self.evictions = 0
        self._root = Node(0, (), None, 0)
        self._nodes: dict[int, Node] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_unheld(self) -> int:
        """Known pages that nobody holds."""
        return len(self._unheld)

    def __contains__(self, page: int) -> bool:
        """Whether a page is known."""
        return page in self._nodes

    # -- tokens to pages ------------------------------------------------------------------------------------------

    def find(self, node: Node | None, tokens: Sequence[int]) -> Node:
        """The longest chain of known pages that `tokens` begin with; at least one token is left over.

        Args:
            node: Result of an earlier call for the same beginning: the search goes on from there. None: from the root.
            tokens: Known tokens of a sequence.

        Returns:
            The last page of the chain; the root where there is none.
        """
        if node is None or not node.known or node.weights != self._root.weights:
            node = self._root
        # The last token's logits yield the next token, so that it must be computed whatever is known.
        limit = (len(tokens) - 1) // self.page_size
        while node.depth > limit:
            assert node.parent is not None
            node = node.parent
        while node.depth < limit:
            child = node.children.get(self._key(tokens, node.depth))
            if child is None:
                break
            node = child
        return node

    def enter(self, node: Node, tokens: Sequence[int], pages: Sequence[int], count: int) -> Node:
        """Make the first `count` pages of a sequence known. Where others hold the same tokens already, those stay.

        Args:
            node: What `find` or `enter` returned last for this sequence.
            tokens: Its tokens, at least `count` pages of them.
            pages: Its pages.
            count: How many are full, and written by steps that have been planned.

        Returns:
            The last known page of the chain.
        """
        if node.weights != self._root.weights or not self.enabled:
            return node  # computed with other weights, in whole or in part
        if not node.known:
            node = self._root  # an equal page of somebody else's, which is gone by now: the sequence has its own
        for index in range(node.depth, count):
            key = self._key(tokens, index)
            child = node.children.get(key)
            if child is None:
                child = Node(pages[index], key, node, node.weights)
                node.children[key] = child
                self._nodes[child.page] = child
            node = child
        return node

    def count(self, queried: int, hit: int) -> None:
        """Add a request's prompt tokens, and how many of them were found, to the figures."""
        if self.enabled:
            self.query_tokens += queried
            self.hit_tokens += hit

    # -- what the owner of the pages says ---------------------------------------------------------------------------

    def hold(self, page: int) -> None:
        """Somebody holds a known page that nobody held."""
        del self._unheld[page]

    def let_go(self, pages: Iterable[int]) -> list[int]:
        """Nobody holds these pages, which one sequence held, any more.

        Returns:
            Those that are not known, and so mean nothing from now on.
        """
        unknown: list[int] = []
        deepest: Node | None = None
        for page in pages:
            node = self._nodes.get(page)
            if node is None:
                unknown.append(page)
                continue
            self._unheld[page] = None
            if deepest is None or node.depth > deepest.depth:
                deepest = node
        # All of the path, and not only these pages: a page before them may be an equal one of somebody else's.
        while deepest is not None:
            if deepest.page in self._unheld:
                self._unheld.move_to_end(deepest.page)
            deepest = deepest.parent
        return unknown

    def evict(self, count: int = 1) -> list[int]:
        """Give up the pages that were not used for longest, each with whatever continues it, until `count` are free.

        There must be that many.

        Returns:
            The pages that mean nothing from now on; at least `count`.
        """
        freed: list[int] = []
        while len(freed) < count:
            top = self._nodes[next(iter(self._unheld))]
            assert top.parent is not None
            del top.parent.children[top.tokens]
            below = [top]
            while below:
                node = below.pop()
                if node.children:
                    below += node.children.values()
                    node.children.clear()
                node.known = False
                del self._nodes[node.page]
                # One that is still held goes on as an unknown page of those who hold it.
                if node.page in self._unheld:
                    del self._unheld[node.page]
                    freed.append(node.page)
        self.evictions += len(freed)
        return freed

    def weights_updated(self) -> list[int]:
        """Forget every page. What live sequences compute does not become known either: part of it is old.

        Returns:
            The pages that nobody holds.
        """
        freed = list(self._unheld)
        self._unheld.clear()
        self._nodes.clear()
        self._root = Node(0, (), None, self._root.weights + 1)
        return freed

    def check_invariants(self) -> None:
        """Every known page is found by its path, and none is given up before what continues it.

        Raises:
            AssertionError: The bookkeeping is broken.
        """
        age = {page: i for i, page in enumerate(self._unheld)}
        found = 0
        below = [self._root]
        while below:
            node = below.pop()
            for key, child in node.children.items():
                assert self._nodes[child.page] is child, "a page that is found is not known"
                assert child.parent is node and child.tokens == key and child.known, "a page is in the wrong place"
                above: Node | None = node
                while child.page in age and above is not None:
                    assert age[child.page] < age.get(above.page, len(age)), "a page would go after what it continues"
                    above = above.parent
            found += len(node.children)
            below += node.children.values()
        assert found == len(self._nodes), "a known page is not found"
        assert all(page in self._nodes for page in self._unheld), "an unknown page is kept"

    def _key(self, tokens: Sequence[int], index: int) -> tuple[int, ...]:
        return tuple(tokens[index * self.page_size : (index + 1) * self.page_size])
