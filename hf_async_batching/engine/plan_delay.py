"""How long the planning of a step can wait for requests that are about to come. No torch, no threads.

With two steps in flight, a step is planned as soon as the step before the last has ended: a whole step before the
device needs the plan. A caller who answers a message that has just been completed comes a moment too late for that
plan, and would wait for that step and the next one. So where there is room for another request, and the step in flight
only decodes, the plan is made only shortly before it is due.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from statistics import median

from hf_async_batching.core.timeline import StepRecord

RECENT, ENOUGH = 16, 8
"""The step time is estimated from at least `ENOUGH` decode-only steps among the last `RECENT`."""

MARGIN = 2e-3
"""Seconds between the plan and the moment at which it is due, in reserve for delays of the host."""

# If the device ran dry behind a wait, the next waits are shorter by that time, and each step pays this share of its
# own time back. So waits never cost a larger share, whatever delays the host and however often. The cut is limited, in
# seconds, for a process that was stopped: it must wait again some time later.
_LOST, _LONGEST_CUT = 0.01, 0.25
# A step's beginning is computed from the device's clock, which may drift, and drawn to the host's by this share.
_DRAWN = 0.02


class PlanDelay:
    """Estimates how long a plan can wait, and learns when steps begin and when waiting was too long."""

    def __init__(self) -> None:
        self._began = self._ended = self._cut = 0.0
        self._waited = False
        self._after_a_wait: deque[bool] = deque()  # of each step in flight

    def waited(self) -> None:
        """Note that the next plan was delayed."""
        self._waited = True

    def planned(self, launched: bool) -> None:
        """Note that a plan was made, and whether there is a step of it."""
        if launched:
            self._after_a_wait.append(self._waited)
        self._waited = False

    def collected(self, arrived: float, began: float, ended: float) -> None:
        """Note that a step's result was read, so that the next one is under way.

        Args:
            arrived: When that was. The step ended before, and long before where the thread was held up.
            began: When the device began the step, by its own clock; all of `time.perf_counter`.
            ended: When it ended it.
        """
        if self._after_a_wait.popleft():
            self._cut = min(_LONGEST_CUT, self._cut + max(0.0, began - self._ended))
        computed = self._began + ended - self._ended
        self._ended = ended
        self._began = min(arrived, computed + _DRAWN * (arrived - computed))

    def spare_seconds(self, records: Sequence[StepRecord], rows: int, context: int, now: float) -> float:
        """Seconds for which the next plan can wait without the device running dry; 0 or less for none.

        Takes the shortest of the last steps, and the median host time per step. A longer host time is taken to mean
        that a thread with a new request holds Python's lock, which is free again after a wait; if that is wrong, later
        waits are shorter by what this one cost. With fewer rows or a shorter context a step gets shorter, but not by a
        larger share than these: it reads all weights anyway.

        Args:
            records: Of the last steps, oldest first.
            rows: That decode in the step in flight, the only one.
            context: Tokens that its attention reads.
            now: The time, of `time.perf_counter`.
        """
        # Steps with drafts take longer, and so do steps with prompts, which the device begins during their launch.
        alone = [
            record
            for record in islice(reversed(records), RECENT)
            if 0 < record.decode_rows == record.tokens and not record.prompt_tokens
        ]
        if len(alone) < ENOUGH:
            return 0.0
        shortest = min(
            [
                (record.compute[1] - record.compute[0])
                * min(1.0, rows / record.decode_rows, context / record.context_tokens)
                for record in alone
            ]
        )
        self._cut = max(0.0, self._cut - _LOST * shortest)
        host = median([record.plan[1] - record.plan[0] + record.settle[1] - record.settle[0] for record in alone])
        return self._began + shortest - now - host - MARGIN - self._cut
