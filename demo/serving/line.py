"""A waiting line: first come, first served, with a place to show."""

from __future__ import annotations

from types import TracebackType

from .errors import LineFullError

# Seconds between two looks at a place in line.
PLACE_SECONDS = 0.25


class Line:
    """Lets a few run at once and a few more wait. Used from one event loop.

    Args:
        running: How many may run at the same time.
        waiting: How many may wait beyond them.
        running_each: How many of one owner may run at the same time; None for no such limit.
        waiting_each: How many of one owner may wait beyond them; None for no such limit.
    """

    def __init__(
        self, running: int, waiting: int, *, running_each: int | None = None, waiting_each: int | None = None
    ) -> None:
        self._running = running
        self._waiting = waiting
        self._running_each = running if running_each is None else running_each
        self._waiting_each = waiting if waiting_each is None else waiting_each
        self._tickets: list[Ticket] = []

    def join(self, owner: str = "") -> Ticket:
        """Stand at the end of the line; leave it by closing the ticket.

        Args:
            owner: The visitor's address; its tickets count together. Empty for a visitor that is counted alone.

        Raises:
            LineFullError: The line is full, or the owner has reached the owner's limit.
        """
        if len(self._tickets) >= self._running + self._waiting:
            raise LineFullError(f"{self._waiting} others are waiting already. Please try again in a minute.")
        own = sum(ticket.owner == owner for ticket in self._tickets) if owner else 0
        if own >= self._running_each + self._waiting_each:
            raise LineFullError(f"{own} from your address already run or wait. Please let one of them end.")
        ticket = Ticket(self, owner)
        self._tickets.append(ticket)
        self._start()
        return ticket

    def place_of(self, ticket: Ticket) -> int:
        """0 for who may run, 1 for who is next."""
        if ticket.running or ticket not in self._tickets:
            return 0
        return 1 + sum(not other.running for other in self._tickets[: self._tickets.index(ticket)])

    def leave(self, ticket: Ticket) -> None:
        """Leave the line; a second call does nothing."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            self._start()

    def _start(self) -> None:
        """Let the first in line run while there is room. A running ticket keeps running."""
        for ticket in self._tickets:
            if sum(other.running for other in self._tickets) >= self._running:
                return
            own = sum(other.running and other.owner == ticket.owner for other in self._tickets) if ticket.owner else 0
            if not ticket.running and own < self._running_each:
                ticket.running = True


class Ticket:
    """A place in a line, until the `with` block that it opens is left.

    Attributes:
        owner: The address of the visitor whose ticket it is.
        running: Whether its turn has come.
    """

    def __init__(self, line: Line, owner: str) -> None:
        self._line = line
        self.owner = owner
        self.running = False

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
