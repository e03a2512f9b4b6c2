"""Record which full KV page holds which tokens, so that a prompt finds pages computed before. Integers only.

Known pages form a tree: the path from the root to a page spells the tokens of the page and of all pages before it. The
page's keys and values depend only on these tokens and the weights. A look-up compares tokens and not only hashes, so
it never confuses two pages. (Sharing pages of equal prefixes is SGLang's RadixAttention, at the granularity of vLLM's
automatic prefix caching.)

A page without a holder stays known until its memory is needed. Then the least recently used page is evicted first.
Using a page also uses all pages before it, so a page is always evicted before the page that it continues.

If layers come in groups, the tokens of a node are in one page of each group. Pages of groups with a window can be
evicted separately. A chain is usable up to a node from which the next token finds every page that it sees.

If rows have states besides their pages, a chain is usable up to a node that has a snapshot of the states.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from hf_async_batching.kv_cache.prefix_node import Node
from hf_async_batching.kv_cache.state_snapshots import SnapshotPool


class PrefixCache:
    """The tree of known pages, and the order in which pages without a holder are evicted.

    It does not count references: its owner (`PageAllocator`) reports when a page is held again or released.

    Args:
        page_size: Tokens per page.
        enabled: If False, no page ever becomes known.
        groups: See `PageAllocator`, as for the other arguments.
        full_attention_groups: Number of leading groups; a node needs their pages.
        window: Number of last tokens that the other groups see.
        snapshots: Snapshots of the rows' states; None for models without states.

    Attributes:
        snapshots: The argument.
        query_tokens: Number of prompt tokens that were looked up.
        hit_tokens: Number of these tokens that were found.
        evictions: Number of known pages that were evicted because their memory was needed.
    """

    def __init__(
        self,
        page_size: int,
        enabled: bool = True,
        *,
        groups: int = 1,
        full_attention_groups: int = 1,
        window: int | None = None,
        snapshots: SnapshotPool | None = None,
    ) -> None:
        self.snapshots = snapshots
        self.page_size = page_size
        self.enabled = enabled
        self._groups = groups
        # If there is one group, a node needs its page, with or without a window.
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
        """Number of known pages without a holder."""
        return len(self._unheld)

    def __contains__(self, page: int) -> bool:
        """Whether a page is known."""
        return page in self._nodes

    # -- tokens to pages ------------------------------------------------------------------------------------------

    def find(self, node: Node | None, tokens: Sequence[int]) -> Node:
        """Find the longest chain of known pages that `tokens` begin with; at least one token is left over.

        Args:
            node: Result of an earlier call for the same beginning, from which the search continues; None for the root.
            tokens: Known tokens of a sequence.

        Returns:
            The last node of the chain; the root if there is none.
        """
        if node is None or not node.known or node.weights != self._root.weights:
            node = self._root
        # The last token must always be computed, because its logits give the next token.
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
        """The last node on the path to `node` after which a sequence can continue.

        All pages that the next token sees must be known, and the states if rows have any.
        """
        candidate = self._in_window(node)
        if self.snapshots is None:
            return candidate
        while candidate.depth and not candidate.snapshot:
            assert candidate.parent is not None
            candidate = self._in_window(candidate.parent)
        return candidate

    def _in_window(self, node: Node) -> Node:
        """The last node on the path to `node` after which the next token finds all pages that it sees."""
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
            # A sequence that continues after any node from here to there needs a page that is missing there.
            assert whole.parent is not None
            candidate = whole.parent
        return candidate

    def pages_before_window(self, position: int) -> int:
        """Number of pages per windowed group that lie before all tokens that the token at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.page_size

    def enter(self, node: Node, tokens: Sequence[int], pages: Sequence[int], count: int) -> Node:
        """Make the first `count` pages of a sequence known. If other pages with the same tokens are known, those stay.

        If a node has lost pages of windowed groups, the sequence's own pages replace them.

        Args:
            node: Last result of `find` or `enter` for this sequence.
            tokens: Its tokens, at least `count` pages of them.
            pages: Its pages of all groups.
            count: Number of full pages per group that are written by steps that are already planned.

        Returns:
            The last known page of the chain.
        """
        if not self.is_current(node) or not self.enabled:
            return node  # computed with other weights, at least in part
        if not node.known:
            node = self._root  # an equal page of another sequence, evicted by now: the sequence has its own page
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

    def is_current(self, node: Node) -> bool:
        """Whether a node was computed with the present weights."""
        return node.weights == self._root.weights

    def count(self, queried: int, hit: int) -> None:
        """Add a request's prompt tokens, and the number of found ones, to the figures."""
        if self.enabled:
            self.query_tokens += queried
            self.hit_tokens += hit

    # -- reports of the pages' owner --------------------------------------------------------------------------------

    def hold(self, page: int) -> None:
        """Note that a known page without a holder is held again."""
        del self._unheld[page]

    def let_go(self, pages: Iterable[int], *, touch: bool = True) -> list[int]:
        """Note that the only sequence that held these pages has released them.

        Args:
            pages: The pages.
            touch: Whether the nodes that they continue count as used now; required if nodes cannot do without the
                pages.

        Returns:
            Pages that are not known, whose contents are now invalid.
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
        # The whole path, and not only these pages: a page before them may be an equal page of another sequence.
        while touch and deepest is not None:
            for page in deepest.pages[: self._required_groups]:
                if page in self._unheld:
                    self._unheld.move_to_end(page)
            deepest = deepest.parent
        return unknown

    def evict(self, count: int = 1) -> list[int]:
        """Evict the least recently used pages, each with everything that continues it, until `count` pages are free.

        There must be enough pages.

        Returns:
            Pages whose contents are now invalid; at least `count`.
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
        """Remove the first node on the path to `node`, with everything that continues it.

        Returns:
            Pages of the removed nodes without a holder.
        """
        if not node.depth or not node.known:
            return []
        while node.parent is not None and node.parent.depth:
            node = node.parent
        # A node of older weights is not in the tree.
        return self._cut(node) if node.weights == self._root.weights else []

    def _cut(self, top: Node) -> list[int]:
        """Remove a node from the tree, with everything that continues it; returns their pages without a holder."""
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
            if self.snapshots is not None:
                self.snapshots.drop(node)
            freed += self._forget(node, 0)
        return freed

    def _forget(self, node: Node, first: int) -> list[int]:
        """Remove the pages of the groups from `first` on from a node; returns those without a holder."""
        freed: list[int] = []
        for group in range(first, len(node.pages)):
            page = node.pages[group]
            if page:
                node.pages[group] = 0
                del self._nodes[page]
                # A page that is still held stays with its holders as an unknown page.
                if page in self._unheld:
                    del self._unheld[page]
                    freed.append(page)
        return freed

    def weights_updated(self) -> list[int]:
        """Remove every page. Pages of live sequences do not become known either, because a part of them is old.

        Returns:
            Pages without a holder.
        """
        freed = list(self._unheld)
        self._unheld.clear()
        self._nodes.clear()
        if self.snapshots is not None:
            self.snapshots.clear()
        self._root = Node([], (), None, self._root.weights + 1)
        return freed

    def check_invariants(self) -> None:
        """Check that every known page is found by its path, and no page is evicted before the pages that continue it.

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
