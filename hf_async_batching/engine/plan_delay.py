"""How long the planning of a step can wait for requests that are about to come. No torch, no threads.

With two steps in flight a step is planned as soon as the one before the last has ended, a whole step before the device
needs it. Who answers a message that has just been completed comes a moment too late for that plan, and would wait for
that step and the next. So where there is room for another request, and the step in flight only decodes, the plan is
made only shortly before it is due.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from statistics import median

from hf_async_batching.core.timeline import StepRecord

RECENT, ENOUGH = 16, 8
"""Of the last `RECENT` steps so many must have been of rows that decode alone, to say how long one takes."""

MARGIN = 2e-3
"""Seconds that stay between the plan and the moment at which it is due, for whatever holds the host up."""

# Where the device ran dry behind a wait, the next waits are cut by as much, and each step pays this share of its own
# time back: no larger share is lost behind waits, whatever holds the host up and however often. The longest cut, in
# seconds, is for a process that was stopped: it shall wait again some day.
_LOST, _LONGEST_CUT = 0.01, 0.25
# A step's beginning is computed from the device's clock, which may drift, and drawn to the host's by this share.
_DRAWN = 0.02


class PlanDelay:
    """Says how long a plan can wait, and learns when steps begin and when waiting was too long."""

    def __init__(self) -> None:
        self._began = self._ended = self._cut = 0.0
        self._waited = False
        self._after_a_wait: deque[bool] = deque()  # of each step in flight

    def waited(self) -> None:
        """Note that the next plan was made wait."""
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

        Counts the shortest of the last steps, and the time that the host usually takes for one of them. Where it took
        longer, that is taken to be Python's lock in the hands of who is about to come, which is free again after a
        wait; where it is not, waits learn from what they cost. With fewer rows or a shorter context a step gets
        shorter, but by no larger a share than these: all weights are read anyway.

        Args:
            records: Of the last steps, oldest first.
            rows: That decode in the step in flight, the only one.
            context: Tokens that its attention reads.
            now: The time, of `time.perf_counter`.
        """
        # Drafts take longer. So do prompts, which the device computes while the host still launches them.
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
