"""Counts the outcomes of all requests, from all threads."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from typing import Literal

Outcome = Literal["done", "refused", "cancelled", "closed", "wrong", "failed"]

_MOST_KEPT = 20


class Tally:
    """Counts that any thread may change.

    Attributes:
        wrong: Up to 20 differences from plain `generate`.
        failed: Up to 20 errors that are neither refusals nor caused by closing an engine.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outcomes: dict[str, Counter[Outcome]] = defaultdict(Counter)
        self._tokens = 0
        self._notes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.failed: list[str] = []

    def add(self, load: str, outcome: Outcome, tokens: int = 0, detail: str = "") -> None:
        """Count one request, or one call of several."""
        with self._lock:
            self._outcomes[load][outcome] += 1
            self._tokens += tokens
            kept = {"wrong": self.wrong, "failed": self.failed}.get(outcome)
            if kept is not None and len(kept) < _MOST_KEPT:
                kept.append(f"{load}: {detail}")

    def note(self, what: str, count: int = 1) -> None:
        """Count something that is not an outcome."""
        with self._lock:
            self._notes[what] += count

    @property
    def tokens(self) -> int:
        """Number of new tokens that callers got."""
        with self._lock:
            return self._tokens

    @property
    def notes(self) -> Counter[str]:
        """The counts of `note`."""
        with self._lock:
            return Counter(self._notes)

    def outcomes(self) -> Counter[Outcome]:
        """Outcomes of all loads together."""
        with self._lock:
            return sum(self._outcomes.values(), Counter())

    def by_load(self) -> dict[str, Counter[Outcome]]:
        """Outcomes of each load."""
        with self._lock:
            return {load: Counter(found) for load, found in sorted(self._outcomes.items())}
