"""Who may run next: first come, first served, with a place that can be shown."""

from __future__ import annotations

from types import TracebackType


class LineFullError(RuntimeError):
    """So many wait already that nobody is added; the message is for the visitor."""


class Line:
    """Lets a few run at once and a few more wait. Used from one event loop.

    Args:
        running: How many may run at the same time.
        waiting: How many may wait beyond them.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self._running = running
        self._waiting = waiting
        self._tickets: list[Ticket] = []

    def join(self) -> Ticket:
        """Stand at the end of the line; leave it by closing the ticket.

        Raises:
            LineFullError: There is no room.
        """
        if len(self._tickets) >= self._running + self._waiting:
            raise LineFullError(f"{self._waiting} others are waiting already. Please try again in a minute.")
        ticket = Ticket(self)
        self._tickets.append(ticket)
        return ticket

    def place_of(self, ticket: Ticket) -> int:
        """0 for who may run, 1 for who is next."""
        return max(0, self._tickets.index(ticket) - self._running + 1)

    def leave(self, ticket: Ticket) -> None:
        """Make room. Nothing happens the second time."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)


class Ticket:
    """A place in a line, until the `with` block that it opens is left."""

    def __init__(self, line: Line) -> None:
        self._line = line

    @property
    def place(self) -> int:
        """0 for who may run, 1 for who is next."""
        return self._line.place_of(self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._line.leave(self)
