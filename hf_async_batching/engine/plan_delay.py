"""Decide how long the planning of a step can wait for requests that are about to come. No torch, no threads.

With two steps in flight, a step is planned as soon as the step before the last has ended: a whole step before the
device needs the plan. A caller who replies to a message that has just been completed comes a moment too late for that
plan, and would wait for that step and the next. So if there is room for another request, and the step in flight only
decodes, the plan is made shortly before it is due.
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
"""Seconds between the plan and the moment when it is due, as a reserve for delays of the host."""

# If the device ran out of work after a wait, later waits are shortened by the lost time, and each step pays back this
# share of its own time. So waits never cost a larger share, whatever delays the host, and however often. The cut has
# an upper limit in seconds: a process that was stopped for a while must wait again some time later.
_LOST, _LONGEST_CUT = 0.01, 0.25
# A step's beginning is computed from the device's clock, which may drift. It moves towards the host's clock by this
# share.
_DRAWN = 0.02


class PlanDelay:
    """Estimates how long a plan can wait, from when steps begin and from waits that were too long."""

    def __init__(self) -> None:
        self._began = self._ended = self._cut = 0.0
        self._waited = False
        self._after_a_wait: deque[bool] = deque()  # one entry per step in flight

    def waited(self) -> None:
        """Note that the next plan was delayed."""
        self._waited = True

    def planned(self, launched: bool) -> None:
        """Note that a plan was made, and whether a step was launched from it."""
        if launched:
            self._after_a_wait.append(self._waited)
        self._waited = False

    def collected(self, arrived: float, began: float, ended: float) -> None:
        """Note that a step's result was read, so the next step is running.

        Args:
            arrived: When the result was read. The step ended earlier; much earlier if the thread was delayed.
            began: When the device began the step, by the device's clock; all times are `time.perf_counter`'s.
            ended: When the device ended the step.
        """
        if self._after_a_wait.popleft():
            self._cut = min(_LONGEST_CUT, self._cut + max(0.0, began - self._ended))
        computed = self._began + ended - self._ended
        self._ended = ended
        self._began = min(arrived, computed + _DRAWN * (arrived - computed))

    def spare_seconds(self, records: Sequence[StepRecord], rows: int, context: int, now: float) -> float:
        """Seconds that the next plan can wait without the device running out of work; 0 or less for no wait.

        The estimate takes the shortest of the last steps, and the median host time per step. It takes a longer host
        time as a sign that a thread with a new request holds Python's lock, and that the lock is free again after a
        wait. If this is wrong, later waits are shortened by the time that this one cost. A step with fewer rows or a
        shorter context is shorter, but by no larger share than its rows and context: it reads all weights in any case.

        Args:
            records: Records of the last steps, oldest first.
            rows: Decoding rows of the only step in flight.
            context: Tokens that its attention reads.
            now: Current time of `time.perf_counter`.
        """
        # Steps with drafts take longer. So do steps with prompts, which the device begins during their launch.
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
