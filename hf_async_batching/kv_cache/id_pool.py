"""Pools of integers that are taken and given back."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class IdPool:
    """A pool of the integers `1 .. size`. Number 0 is never handed out: it is the padding page and the padding row.

    Args:
        size: Number of ids in the pool.
        what: The noun in error messages ("page", "row").

    Attributes:
        on_release: Called with released ids, at the moment when their contents become invalid. Tests set a function
            here that overwrites the contents at once.
    """

    def __init__(self, size: int, what: str) -> None:
        if size < 1:
            raise ValueError(f"a pool needs at least one {what}, got {size}")
        self.size = size
        self.what = what
        self.on_release: Callable[[list[int]], None] | None = None
        # Lowest ids on top of the stack, so that adjacent pages of a request tend to be adjacent in memory.
        self._free = list(range(size, 0, -1))
        self._taken = bytearray(size + 1)

    @property
    def available(self) -> int:
        """Number of ids that can be taken now."""
        return len(self._free)

    @property
    def in_use(self) -> int:
        """Number of taken ids."""
        return self.size - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Take `count` ids; None, without any change, if fewer than `count` are free."""
        if count > len(self._free):
            return None
        ids = [self._free.pop() for _ in range(count)]
        for i in ids:
            self._taken[i] = 1
        return ids

    def release(self, ids: Iterable[int]) -> None:
        """Give ids back.

        Raises:
            RuntimeError: An id was not taken: the caller's bookkeeping is broken.
        """
        returned = sorted(ids, reverse=True)
        for i in returned:
            if not self._taken[i]:
                raise RuntimeError(f"{self.what} {i} was released twice or never taken")
            self._taken[i] = 0
            self._free.append(i)
        if self.on_release is not None and returned:
            self.on_release(returned)
