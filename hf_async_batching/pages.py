"""Who owns which KV page and which row: integers only."""

from __future__ import annotations

from collections.abc import Callable, Iterable


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
    """The pages of the KV cache.

    Args:
        num_pages: Pages that requests can own (the padding page not counted).
        page_size: Tokens in a page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        super().__init__(num_pages, "page")
        self.page_size = page_size

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)
