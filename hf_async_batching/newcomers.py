"""How long the planning of a step can wait for requests that are about to come. No torch, no threads.

With two steps in flight a step is planned as soon as the one before the last has ended, a whole step before the device
needs it. Who answers a message that has just been completed comes a moment too late for that plan, and would wait for
that step and the next. So where there is room for another request, and the step in flight only decodes, the plan is
made only shortly before it is due.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from statistics import median

from hf_async_batching.timeline import StepRecord

RECENT, ENOUGH = 16, 8
"""Of the last `RECENT` steps so many must have been of rows that decode alone, to say how long one takes."""

MARGIN = 2e-3
"""Seconds that stay between the plan and the moment at which it is due, for whatever holds the host up."""

# The share of the last delay in what is expected of the next one, and what is left of that after each step.
_LEARNING, _FORGETTING = 0.25, 0.99
# A step's beginning is computed from the device's clock, which may drift, and drawn to the host's by this share.
_DRAWN = 0.02


class Patience:
    """Says how long a plan can wait, and learns when steps begin and how late this process's threads wake up."""

    def __init__(self) -> None:
        self._began = self._ended = self._late = 0.0

    def collected(self, arrived: float, ended: float) -> None:
        """Note that a step's result was read, so that the next one is under way.

        Args:
            arrived: When that was. The step ended before, and long before where the thread was held up.
            ended: When the device ended the step, by its own clock; both of `time.perf_counter`.
        """
        computed = self._began + ended - self._ended
        self._ended = ended
        self._began = min(arrived, computed + _DRAWN * (arrived - computed))

    def spare_seconds(self, records: Sequence[StepRecord], rows: int, context: int, now: float) -> float:
        """Seconds for which the next plan can wait without the device running dry; 0 or less for none.

        Counts the shortest of the last steps, and the time that the host usually takes for one of them: what takes it
        longer is mostly Python's lock, in the hands of who is about to come, and is over when this has waited. With
        fewer rows or a shorter context a step gets shorter, but by no larger a share than these: all weights are read
        anyway.

        Args:
            records: Of the last steps, oldest first.
            rows: That decode in the step in flight, the only one.
            context: Tokens that its attention reads.
            now: The time, of `time.perf_counter`.
        """
        self._late *= _FORGETTING
        # Neither with prompts nor with drafts, of which a step can be all.
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
        host = median([record.plan[1] - record.plan[0] + record.settle[1] - record.settle[0] for record in alone])
        return self._began + shortest - now - host - MARGIN - self._late

    def woke(self, late: float) -> None:
        """Note how many seconds after the end of a wait its thread went on: others may have held Python's lock."""
        self._late += _LEARNING * (max(0.0, late) - self._late)
