"""Which full KV page holds which tokens, so that a prompt finds the pages that others have computed. Integers only.

Known pages form a tree: the path from the root to a page spells the tokens of the page and of all pages before it,
which with the weights are all that its keys and values depend on. A look-up compares tokens, never their hashes
alone, so that nothing is taken for something else. (Sharing pages of equal prefixes is SGLang's RadixAttention, at the
granularity of vLLM's automatic prefix caching.)

A page without a holder stays known until its memory is wanted. The least recently used page is then given up first.
Using a page uses all pages before it, so that a page always goes before the one that it continues.

Where layers come in groups, the tokens of a place in the tree stand in a page of each. Those of the groups that see a
window only can be given up alone. A chain is of use as far as it has them all where the next token looks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class Node:
    """A known page, or one of each group of layers.

    Attributes:
        pages: Numbers of the pages, one for each group, 0 for one that is gone; none for the root.
        tokens: Their tokens.
        depth: Nodes on the path from the root, this one included.
        parent: What it continues; None for the root.
        weights: Version of the weights that computed it.
        known: False once its pages were given up: nothing must be entered below it any more.
        children: What continues it, by their tokens.
    """

    __slots__ = ("children", "depth", "known", "pages", "parent", "tokens", "weights")

    def __init__(self, pages: list[int], tokens: tuple[int, ...], parent: Node | None, weights: int) -> None:
        self.pages = pages
        self.tokens = tokens
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.parent = parent
        self.weights = weights
        self.known = True
        self.children: dict[tuple[int, ...], Node] = {}

    def path(self) -> list[int]:
        """The pages from the first node to this one, those of one node together."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.depth:
            nodes.append(node)
            node = node.parent
        return [page for node in reversed(nodes) for page in node.pages]


class PrefixCache:
    """The tree of known pages, and the order in which pages without a holder are given up.

    It counts no references: its owner (`PageAllocator`) says when a page is held again or let go.

    Args:
        page_size: Tokens in a page.
        enabled: Where False, no page ever becomes known.
        groups: See `PageAllocator`, as for the other arguments.
        full_attention_groups: The first groups, whose pages a node cannot do without.
        window: How far the other groups see.

    Attributes:
        query_tokens: Prompt tokens that were looked up.
        hit_tokens: Those of them that were found.
        evictions: Known pages that were given up because their memory was wanted.
    """

    def __init__(
        self,
        page_size: int,
        enabled: bool = True,
        *,
        groups: int = 1,
        full_attention_groups: int = 1,
        window: int | None = None,
    ) -> None:
        self.page_size = page_size
        self.enabled = enabled
        self._groups = groups
        # Where there is one group, its page is what makes the node, whether or not it has a window.
        self._required_groups = max(1, full_attention_groups)
        self.window = window
        self.query_tokens = 0
        self.hit_tokens = 0
        self.evictions = 0
        self._root = Node([], (), None, 0)
        self._nodes: dict[int, Node] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_unheld(self) -> int:
        """Known pages without a holder."""
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

    def usable(self, node: Node) -> Node:
        """The last node on the way to `node` behind which a sequence can go on.

        All pages that the next token sees must be there.
        """
        if self._groups == 1:
            return node
        candidate = node
        while candidate.depth:
            seen = self.pages_before_window(candidate.depth * self.page_size)
            whole = candidate
            while whole.depth > seen and all(whole.pages):
                assert whole.parent is not None
                whole = whole.parent
            if whole.depth == seen:
                return candidate
            # A sequence that goes on behind any node from here to there needs what is missing there.
            assert whole.parent is not None
            candidate = whole.parent
        return candidate

    def pages_before_window(self, position: int) -> int:
        """How many pages of each group with a window lie before all that the token at `position` sees there."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.page_size

    def enter(self, node: Node, tokens: Sequence[int], pages: Sequence[int], count: int) -> Node:
        """Make the first `count` pages of a sequence known. Where others hold the same tokens already, those stay.

        Of a node that has given pages of windows up, the sequence's own take their place.

        Args:
            node: What `find` or `enter` returned last for this sequence.
            tokens: Its tokens, at least `count` pages of them.
            pages: Its pages, of all groups.
            count: How many of each group are full, and written by steps that have been planned.

        Returns:
            The last known page of the chain.
        """
        if node.weights != self._root.weights or not self.enabled:
            return node  # computed with other weights, in whole or in part
        if not node.known:
            node = self._root  # an equal page of another sequence, which is gone by now: the sequence has its own
        for index in range(node.depth, count):
            key = self._key(tokens, index)
            child = node.children.get(key)
            own = pages[index * self._groups : (index + 1) * self._groups]
            if child is None:
                child = node.children[key] = Node([*own], key, node, node.weights)
                self._nodes.update((page, child) for page in own if page)
            elif self._groups > 1:
                for group in range(self._required_groups, self._groups):
                    if own[group] and not child.pages[group]:
                        child.pages[group] = own[group]
                        self._nodes[own[group]] = child
            node = child
        return node

    def count(self, queried: int, hit: int) -> None:
        """Add a request's prompt tokens, and how many of them were found, to the figures."""
        if self.enabled:
            self.query_tokens += queried
            self.hit_tokens += hit

    # -- what the owner of the pages says ---------------------------------------------------------------------------

    def hold(self, page: int) -> None:
        """Note that a known page without a holder has one now."""
        del self._unheld[page]

    def let_go(self, pages: Iterable[int], *, touch: bool = True) -> list[int]:
        """Note that the one sequence that held these pages has let them go.

        Args:
            pages: The pages.
            touch: Whether what they continue counts as used just now; it must where they make their nodes.

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
        # All of the path, and not only these pages: a page before them may be an equal one of another sequence.
        while touch and deepest is not None:
            for page in deepest.pages[: self._required_groups]:
                if page in self._unheld:
                    self._unheld.move_to_end(page)
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
            page = next(iter(self._unheld))
            top = self._nodes[page]
            if top.pages.index(page) >= self._required_groups:
                freed += self._forget(top, self._required_groups)
                continue
            freed += self._cut(top)
        self.evictions += len(freed)
        return freed

    def forget(self, node: Node) -> list[int]:
        """Forget the first node on the path to `node`, with all that continues it.

        Returns:
            Those of their pages that are not held.
        """
        if not node.depth or not node.known:
            return []
        while node.parent is not None and node.parent.depth:
            node = node.parent
        # One of older weights is in no tree.
        return self._cut(node) if node.weights == self._root.weights else []

    def _cut(self, top: Node) -> list[int]:
        """Take a node out of the tree, with all that continues it; those of their pages that are not held."""
        freed: list[int] = []
        assert top.parent is not None
        del top.parent.children[top.tokens]
        below = [top]
        while below:
            node = below.pop()
            if node.children:
                below += node.children.values()
                node.children.clear()
            node.known = False
            freed += self._forget(node, 0)
        return freed

    def _forget(self, node: Node, first: int) -> list[int]:
        """Take the pages of the groups from `first` on from a node; those without a holder."""
        freed: list[int] = []
        for group in range(first, len(node.pages)):
            page = node.pages[group]
            if page:
                node.pages[group] = 0
                del self._nodes[page]
                # One that is still held goes on as an unknown page of those who hold it.
                if page in self._unheld:
                    del self._unheld[page]
                    freed.append(page)
        return freed

    def weights_updated(self) -> list[int]:
        """Forget every page. What live sequences compute does not become known either: part of it is old.

        Returns:
            The pages without a holder.
        """
        freed = list(self._unheld)
        self._unheld.clear()
        self._nodes.clear()
        self._root = Node([], (), None, self._root.weights + 1)
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
                known = [page for page in child.pages if page]
                assert all(self._nodes[page] is child for page in known), "a page that is found is not known"
                assert all(child.pages[: self._required_groups]), "a node without a page that makes it"
                assert child.parent is node and child.tokens == key and child.known, "a page is in the wrong place"
                found += len(known)
                last = max([age.get(page, -1) for page in child.pages[: self._required_groups]])
                above: Node | None = node
                while last >= 0 and above is not None:
                    first = min(
                        [age.get(page, len(age)) for page in above.pages[: self._required_groups]], default=len(age)
                    )
                    assert last < first, "a page would go after what it continues"
                    above = above.parent
            below += node.children.values()
        assert found == len(self._nodes), "a known page is not found"
        assert all(page in self._nodes for page in self._unheld), "an unknown page is kept"

    def _key(self, tokens: Sequence[int], index: int) -> tuple[int, ...]:
        return tuple(tokens[index * self.page_size : (index + 1) * self.page_size])
