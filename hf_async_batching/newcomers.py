"""How long the planning of a step can wait for requests that are about to come. No torch, no threads.

With two steps in flight a step is planned as soon as the one before the last has ended, a whole step before the device
needs it. Who answers a message that has just been completed comes a moment too late for that plan, and would wait for
that step and the next. So where there is room for another request the plan is made only shortly before it is due.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from hf_async_batching.timeline import StepRecord

RECENT = 16
"""Steps that say how long steps take."""

MARGIN = 2e-3
"""Seconds that stay between the plan and the moment at which it is due, for whatever holds the host up."""


_FORGETTING = 0.9


class Patience:
    """Says how long a plan can wait, and learns how late this process's threads wake up."""

    def __init__(self) -> None:
        self._late = 0.0

    def spare_seconds(self, records: Sequence[StepRecord], in_flight: int, arrived: float, now: float) -> float:
        """Seconds for which the next plan can wait without the device running dry; 0 or less for none.

        Counts the shortest of the last `RECENT` steps, and the longest time that the host took for one of them.

        Args:
            records: Of the last steps, oldest first.
            in_flight: Steps that have been launched and not collected.
            arrived: When the last result arrived, which is when the first of them began.
            now: The time; like `arrived` of `time.perf_counter`.
        """
        recent = list(islice(reversed(records), RECENT))
        if not in_flight or len(recent) < RECENT:
            return 0.0
        step = min([record.compute[1] - record.compute[0] for record in recent])
        host = max([record.plan[1] - record.plan[0] + record.settle[1] - record.settle[0] for record in recent])
        return arrived + in_flight * step - now - host - MARGIN - self._late

    def woke(self, late: float) -> None:
        """Note how many seconds after the end of a wait its thread went on: others may have held Python's lock."""
        self._late = max(late, _FORGETTING * self._late)
