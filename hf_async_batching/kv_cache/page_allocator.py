"""Record which sequence owns which KV page and which row: integers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hf_async_batching.kv_cache.id_pool import IdPool
from hf_async_batching.kv_cache.prefix_cache import PrefixCache
from hf_async_batching.kv_cache.prefix_node import Node
from hf_async_batching.kv_cache.state_snapshots import SnapshotPool


class PageAllocator(IdPool):
    """The pages of the KV cache, which several sequences may hold at once.

    A page without a holder is free, unless the prefix cache knows it. A known page keeps its contents and counts as
    available; it is taken when no free page is left. A sequence writes only to pages that it took; shared pages are
    full.

    Args:
        num_pages: Pages that requests can own (the padding page not counted).
        page_size: Tokens in a page.
        prefix_cache: Whether full pages can be found by their tokens.
        groups: Groups of layers. Each token is in one page of each group. In every list, the pages of one position
            follow each other, with 0 for a released page.
        full_attention_groups: Number of leading groups that see all tokens; 0 for a single group with a window.
        window: Number of last tokens that the other groups see; None if they see all tokens too.
        snapshots: Snapshots of the rows' states; None for models without states.

    Attributes:
        prefixes: The known pages.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        prefix_cache: bool = True,
        *,
        groups: int = 1,
        full_attention_groups: int = 1,
        window: int | None = None,
        snapshots: SnapshotPool | None = None,
    ) -> None:
        super().__init__(num_pages, "page")
        self.page_size = page_size
        self.groups = groups
        self.full_attention_groups = full_attention_groups
        self.prefixes = PrefixCache(
            page_size,
            prefix_cache,
            groups=groups,
            full_attention_groups=full_attention_groups,
            window=window,
            snapshots=snapshots,
        )
        self._holders = [0] * (num_pages + 1)

    def pages_for(self, num_tokens: int) -> int:
        """Number of pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size) * self.groups

    def room_in(self, num_pages: int) -> int:
        """Number of tokens that this many pages hold, in order of position."""
        return num_pages // self.groups * self.page_size

    @property
    def available(self) -> int:
        """Number of pages that can be taken now: free pages, and known pages that no sequence holds."""
        return super().available + self.prefixes.num_unheld

    @property
    def in_use(self) -> int:
        """Number of pages that sequences hold."""
        return super().in_use - self.prefixes.num_unheld

    def take(self, count: int) -> list[int] | None:
        """Take `count` pages; None, without any change, if fewer are available."""
        if count > self.available:
            return None
        missing = count - super().available
        if missing > 0:
            super().release(self.prefixes.evict(missing))
        pages = super().take(count)
        for page in pages or ():
            self._holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Hold known pages, which other sequences may hold too."""
        for page in pages:
            if not page:
                continue
            if not self._holders[page]:
                self.prefixes.hold(page)
            self._holders[page] += 1

    def release(self, ids: Iterable[int], *, touch: bool = True) -> None:
        """Give back the pages that one sequence held.

        Args:
            ids: The pages.
            touch: Whether the pages that they continue count as used now.

        Raises:
            RuntimeError: No sequence held a page: the caller's bookkeeping is broken.
        """
        unheld: list[int] = []
        for page in ids:
            if not self._holders[page]:
                raise RuntimeError(f"page {page} was released twice or never taken")
            self._holders[page] -= 1
            if not self._holders[page]:
                unheld.append(page)
        super().release(self.prefixes.let_go(unheld, touch=touch))

    def num_held(self, pages: Iterable[int]) -> int:
        """Number of these pages that sequences hold; sharing these pages leaves as many available as before."""
        return sum([self._holders[page] > 0 for page in pages])

    def num_coming_back(self, pages: Iterable[int]) -> int:
        """How many distinct pages would become free if these references were dropped."""
        return sum([self._holders[page] == count for page, count in Counter(pages).items()])

    def are_own(self, pages: Iterable[int]) -> bool:
        """Whether each page has a single holder and cannot be found by other sequences."""
        return all([self._holders[page] == 1 and page not in self.prefixes for page in pages if page])

    def forget(self, node: Node) -> None:
        """Remove every known page that shares a page with the path to `node`."""
        super().release(self.prefixes.forget(node))

    def weights_updated(self) -> None:
        """Drop the contents of all pages; see `PrefixCache.weights_updated`."""
        super().release(self.prefixes.weights_updated())

    def check_invariants(self, held: Iterable[int]) -> None:
        """Check that no page is lost, given every page that a sequence holds, once per holder.

        Raises:
            AssertionError: The bookkeeping is broken.
        """
        counts = Counter(held)
        assert len(counts) == self.in_use, "pages in != pages out"
        assert counts == Counter({page: n for page, n in enumerate(self._holders) if n}), "a page's holders are wrong"
        assert 0 not in counts, "the padding page was handed out"
        self.prefixes.check_invariants()
