"""The window of unfinished rows, which limits how far reading runs ahead."""

from __future__ import annotations

import threading
from collections import deque


class RowWindow:
    """Holds the reader back, so that the memory of a run does not grow with its length.

    Args:
        rows: Number of rows that may be unfinished at once.
        span: Largest distance in rows between the oldest unfinished row and the last row that was read.
    """

    def __init__(self, rows: int, span: int) -> None:
        self._rows = rows
        self._span = span
        self._changed = threading.Condition()
        self._order: deque[int] = deque()
        self._left: set[int] = set()
        self._closed = False

    def enter(self, indices: list[int]) -> bool:
        """Wait until there is room for these rows, which follow all that entered before.

        A larger number of rows than the window holds enters when the window is empty. Returns False if the run was
        stopped.
        """
        with self._changed:
            while not (self._closed or self._fits(indices)):
                self._changed.wait()
            self._order.extend(indices)
            return not self._closed

    def leave(self, index: int) -> None:
        """Remove a finished row that its consumer has taken."""
        with self._changed:
            self._left.add(index)
            while self._order and self._order[0] in self._left:
                self._left.remove(self._order.popleft())
            self._changed.notify_all()

    def close(self) -> None:
        """End every wait; `enter` returns False from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __len__(self) -> int:
        """Return the number of unfinished rows."""
        return len(self._order) - len(self._left)

    def _fits(self, indices: list[int]) -> bool:
        if not indices or not self._order:
            return True
        return len(self) + len(indices) <= self._rows and indices[-1] - self._order[0] < self._span
