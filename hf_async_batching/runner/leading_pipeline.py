"""A pipeline that sends every step that it launches to the model's other ranks."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from hf_async_batching.core.plan import Features, Launch, Plan, Result
from hf_async_batching.distributed.rank_group import End, RankGroup, Step, Tune, Warm, checksum
from hf_async_batching.runner.pipeline import Pipeline

logger = logging.getLogger(__name__)


class LeadingPipeline(Pipeline):
    """The pipeline of rank 0.

    Args:
        group: The ranks.
        arguments: Positional arguments of `Pipeline`.
        settings: Keyword arguments of `Pipeline`.
    """

    def __init__(self, group: RankGroup, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._group = group
        self._rows: tuple[int, ...] | None = None
        self._collected: dict[int, int] = {}

    def launch(self, plan: Plan, planned_at: float) -> Launch:
        """Launch a step on every rank."""
        unchanged = plan.decode_rows is self._rows
        self._rows = plan.decode_rows
        sent = replace(plan, decode_rows=()) if unchanged else plan
        collected, self._collected = self._collected, {}
        self._group.send(Step(sent, unchanged, collected))
        return super().launch(plan, planned_at)

    def collect(self, launch: Launch) -> Result:
        """Read a step's tokens."""
        result = super().collect(launch)
        self._collected[result.step] = checksum(result.tokens)
        return result

    def warm(self, features: Features) -> None:
        """Run and capture the decode buckets on every rank."""
        self._group.send(Warm(features))
        super().warm(features)

    def tune(self) -> None:
        """Measure kernel settings on every rank."""
        self._group.send(Tune())
        super().tune()

    def close(self) -> None:
        """Close every rank's engine."""
        try:
            self._group.send(End())
        except Exception:  # the process group may be gone, or another rank
            logger.exception("the other ranks could not be told that the engine ends")
        super().close()
