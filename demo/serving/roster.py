"""Decides which visitors' requests the engine gets next, and knows the places of those that wait."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from hf_async_batching import GenerationHandle
    from hf_async_batching.core.request import Request

# One in this many rows and tokens stays free for a visitor who has nothing running yet.
_SPARE = 8


class Capacity(NamedTuple):
    """The rows and tokens that the engine holds at once, and the prompt tokens that it computes in one step."""

    rows: int
    tokens: int
    step_tokens: int


@dataclass
class _Entry:
    owner: str
    prompt: int
    tokens: int
    rows: int = 1
    handle: GenerationHandle | None = None
    computed: bool = False

    @property
    def ahead(self) -> int:
        """Return the prompt tokens that are computed before those of a request that comes now."""
        if not self.computed and self.handle is not None:
            self.computed = bool(self.handle.started and self.handle.tokens_from(0))
        return 0 if self.computed else self.prompt


class Roster:
    """Live requests by arrival, and requests that wait to enter the engine. Methods may be called from any thread.

    The engine serves requests in the order of their arrival, so a visitor with many requests could make the next
    visitor wait. An owner therefore always has room for one request. The owner has room for more while an eighth of
    the rows and of the KV pages stays free and few of the owner's prompt tokens wait. The owner with the fewest
    requests comes first.

    Args:
        capacity: The engine's capacity; None admits every request at once.
    """

    def __init__(self, capacity: Capacity | None = None) -> None:
        self._capacity = capacity
        self._live: dict[str, _Entry] = {}
        self._waiting: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def ask(self, request: Request, owner: str = "") -> None:
        """Put a request at the end of the line for the engine."""
        prompt = len(request.prompt)
        entry = _Entry(owner or request.request_id, prompt, prompt + request.max_new_tokens)
        with self._lock:
            self._waiting[request.request_id] = entry
            self._admit()

    def may_enter(self, request: Request) -> bool:
        """Say whether a request in the line may be submitted now. A yes stays valid."""
        with self._lock:
            if request.request_id in self._waiting:
                self._admit()
            return request.request_id not in self._waiting

    def forget(self, *requests: Request) -> None:
        """Remove requests that will not be submitted. Submitted requests stay until they are done."""
        with self._lock:
            for request in requests:
                self._waiting.pop(request.request_id, None)
                entry = self._live.get(request.request_id)
                if entry is not None and entry.handle is None:
                    del self._live[request.request_id]

    def reserve(self, name: str, owner: str, rows: int) -> None:
        """Count rows that are taken without the line, until `release`."""
        with self._lock:
            self._live[name] = _Entry(owner, 0, 0, rows)

    def release(self, name: str) -> None:
        """Release the rows that `reserve` counted."""
        with self._lock:
            self._live.pop(name, None)

    def add(self, *handles: GenerationHandle) -> None:
        """Remember requests that were submitted just now."""
        with self._lock:
            for handle in handles:
                self._live.setdefault(handle.request_id, _Entry(handle.request_id, 0, 0)).handle = handle

    def places(self) -> dict[str, int]:
        """Return the place, from 1, of each request whose prompt is not being computed yet, by request id.

        Requests in the engine come first, in the order of their arrival. A preempted request is left out.
        """
        with self._lock:
            waiting = [*self._not_started(), *self._waiting]
        return {request_id: place for place, request_id in enumerate(waiting, 1)}

    def waiting(self) -> tuple[int, int]:
        """Return the number of requests with a place, and the number of these in the engine."""
        with self._lock:
            entered = len(self._not_started())
            return entered + len(self._waiting), entered

    def _not_started(self) -> list[str]:
        self._drop_done()
        return [
            request_id
            for request_id, entry in self._live.items()
            if entry.handle is not None and not entry.handle.started
        ]

    def _drop_done(self) -> None:
        for name in [name for name, entry in self._live.items() if entry.handle is not None and entry.handle.done]:
            del self._live[name]

    def _admit(self) -> None:
        """Admit requests while there is room."""
        self._drop_done()
        running = Counter[str]()
        for entry in self._live.values():
            running[entry.owner] += entry.rows
        while self._waiting:
            # Take the first request of each owner, and among these the one whose owner has the fewest running.
            first: dict[str, str] = {}
            for name, entry in self._waiting.items():
                first.setdefault(entry.owner, name)
            for owner in sorted(first, key=lambda owner: running[owner]):
                if self._has_room(self._waiting[first[owner]], running[owner]):
                    self._live[first[owner]] = self._waiting.pop(first[owner])
                    running[owner] += 1
                    break
            else:
                return

    def _has_room(self, entry: _Entry, running: int) -> bool:
        if self._capacity is None or not running:
            return True
        live = self._live.values()
        rows, tokens, step_tokens = self._capacity
        ahead = sum(other.ahead for other in live if other.owner == entry.owner)
        return (
            sum(other.rows for other in live) < rows - max(1, rows // _SPARE)
            and sum(other.tokens for other in live) + entry.tokens <= tokens - tokens // _SPARE
            and (not ahead or ahead + entry.prompt <= 2 * step_tokens)
        )
