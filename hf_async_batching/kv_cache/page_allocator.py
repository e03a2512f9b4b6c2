"""Who owns which KV page and which row: integers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from hf_async_batching.kv_cache.prefix_cache import Node, PrefixCache


class IdPool:
    """A pool of the integers `1 .. size`. Number 0 is never handed out: it is the padding page and the padding row.

    Args:
        size: How many ids the pool owns.
        what: The noun in error messages ("page", "row").

    Attributes:
        on_release: Called with the ids that come back, at the moment from which their contents mean nothing any
            more. Tests put an adversary here that overwrites them at once.
    """

    def __init__(self, size: int, what: str) -> None:
        if size < 1:
            raise ValueError(f"a pool needs at least one {what}, got {size}")
        self.size = size
        self.what = what
        self.on_release: Callable[[list[int]], None] | None = None
        # Lowest ids on top of the stack: neighbouring pages of one request then tend to be neighbours in memory.
        self._free = list(range(size, 0, -1))
        self._taken = bytearray(size + 1)

    @property
    def available(self) -> int:
        """Ids that can be taken now."""
        return len(self._free)

    @property
    def in_use(self) -> int:
        """Ids that are taken."""
        return self.size - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Take `count` ids, or none at all: returns None where fewer than `count` are free."""
        if count > len(self._free):
            return None
        ids = [self._free.pop() for _ in range(count)]
        for i in ids:
            self._taken[i] = 1
        return ids

    def release(self, ids: Iterable[int]) -> None:
        """Give ids back.

        Raises:
            RuntimeError: An id was not taken: the bookkeeping of the caller is broken.
        """
        returned = sorted(ids, reverse=True)
        for i in returned:
            if not self._taken[i]:
                raise RuntimeError(f"{self.what} {i} was released twice or never taken")
            self._taken[i] = 0
            self._free.append(i)
        if self.on_release is not None and returned:
            self.on_release(returned)


class PageAllocator(IdPool):
    """The pages of the KV cache, which several sequences may hold at once.

    A page without a holder is free, unless the prefix cache knows it. Then it keeps its contents and counts as
    available, and is taken when no free page is left. A sequence writes only to pages that it took; those that it
    shares are full.

    Args:
        num_pages: Pages that requests can own (the padding page not counted).
        page_size: Tokens in a page.
        prefix_cache: Whether full pages become known by their tokens.
        groups: Groups of layers. Tokens stand in a page of each; the pages of one position follow each other in
            every list, with 0 for one that is gone.
        full_attention_groups: How many of the first groups see all tokens; 0 where there is one group, and a window.
        window: How many of the last tokens the others see; None where these see all, too.

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
    ) -> None:
        super().__init__(num_pages, "page")
        self.page_size = page_size
        self.groups = groups
        self.full_attention_groups = full_attention_groups
        self.prefixes = PrefixCache(
            page_size, prefix_cache, groups=groups, full_attention_groups=full_attention_groups, window=window
        )
        self._holders = [0] * (num_pages + 1)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size) * self.groups

    def room_in(self, num_pages: int) -> int:
        """Tokens that so many pages hold, in order of position."""
        return num_pages // self.groups * self.page_size

    @property
    def available(self) -> int:
        """Pages that can be taken now: free ones, and known ones that no sequence holds."""
        return super().available + self.prefixes.num_unheld

    @property
    def in_use(self) -> int:
        """Pages that sequences hold."""
        return super().in_use - self.prefixes.num_unheld

    def take(self, count: int) -> list[int] | None:
        """Take `count` pages, or none at all: returns None where fewer are available."""
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
        """Hold known pages, alone or together with others."""
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
            touch: Whether what they continue counts as used just now.

        Raises:
            RuntimeError: No sequence held a page: the bookkeeping of the caller is broken.
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
        """How many of the pages sequences hold: sharing these takes nothing from what is available."""
        return sum([self._holders[page] > 0 for page in pages])

    def num_coming_back(self, pages: Iterable[int]) -> int:
        """How many distinct pages would become free if these references were dropped."""
        return sum([self._holders[page] == count for page, count in Counter(pages).items()])

    def are_own(self, pages: Iterable[int]) -> bool:
        """Whether each page has a single holder, and no other sequence can find it."""
        return all([self._holders[page] == 1 and page not in self.prefixes for page in pages if page])

    def forget(self, node: Node) -> None:
        """Let nothing be found any more that shares a page with the path to `node`."""
        super().release(self.prefixes.forget(node))

    def weights_updated(self) -> None:
        """Forget what the pages hold; see `PrefixCache.weights_updated`."""
        super().release(self.prefixes.weights_updated())

    def check_invariants(self, held: Iterable[int]) -> None:
        """Pages in = pages out, given every page that a sequence holds, once per holder.

        Raises:
            AssertionError: The bookkeeping is broken.
        """
        counts = Counter(held)
        assert len(counts) == self.in_use, "pages in != pages out"
        assert counts == Counter({page: n for page, n in enumerate(self._holders) if n}), "a page's holders are wrong"
        assert 0 not in counts, "the padding page was handed out"
        self.prefixes.check_invariants()
