"""The same prompts at depth 1 and at depth 2, on the same engine: what each took."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Any

from hf_async_batching.bench.measure import Pace
from hf_async_batching.bench.timeline_picture import steady_window
from hf_async_batching.core.timeline import StepRecord

from ..serving.backend import Backend
from ..serving.pools import WALLS
from ..serving.pulse import drawn_steps
from ..serving.serving import Serving
from ..serving.settings import Settings
from ..wall.wall import Wall

SYNC, ASYNC = 1, 2
DRAWN_STEPS = 10
_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Outcome:
    """What a run took.

    Attributes:
        depth: Steps in flight: 1 is synchronous.
        chats: Conversations, all there at the start.
        tokens: New tokens.
        seconds: From the first question to the last token.
        tokens_per_second: `tokens` over `seconds`.
        ms_per_step: Mean time per step, idle gaps included.
        busy_percent: Share of the time from the first step to the last in which one was computed.
        host_ms_per_step: Planning, launching and settling; no waiting.
        mbu_percent: Bytes that the steps had to read, over `seconds`, over the measured bandwidth of a copy.
        steps: Steps.
        others: Other requests that ended meanwhile or were live at the end: they were in the same batch.
        gpu: Whether it ran on a GPU: on a CPU there is nothing to overlap.
        drawn: A few steps from the middle, as the page draws them.
    """

    depth: int
    chats: int
    tokens: int
    seconds: float
    tokens_per_second: float
    ms_per_step: float
    busy_percent: float
    host_ms_per_step: float
    mbu_percent: float
    steps: int
    others: int
    gpu: bool
    drawn: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with figures rounded to what they are good for."""
        return {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class ComparisonStep:
    """Where a comparison stands: the depth that runs, how much of it is done (0 to 1), and the speed up to now."""

    depth: int
    done: float
    speed: float


class DepthComparison:
    """Runs prompts at one depth after the other, and goes back to the usual depth.

    Args:
        backend: What answers.
        prompts: First questions.
        chats: How many conversations.
        max_new_tokens: Longest answer. Answers are greedy, so that all runs have the same work to do.
        owner: The address of the visitor.

    Attributes:
        outcomes: By depth, what is over.
        same: How many conversations had the same tokens at every depth; None before there are two outcomes.
    """

    def __init__(
        self, backend: Backend, prompts: Sequence[str], *, chats: int, max_new_tokens: int, owner: str = ""
    ) -> None:
        self._backend = backend
        self._prompts = prompts
        self._chats = chats
        self._owner = owner
        self._settings = replace(Settings(), max_new_tokens=max_new_tokens, greedy=True)
        self._tokens: dict[int, list[list[int]]] = {}
        self.outcomes: dict[int, Outcome] = {}

    @property
    def same(self) -> int | None:
        """How many conversations had the same tokens at both depths; None where not both have run."""
        if len(self._tokens) < 2:
            return None
        first, second = self._tokens.values()
        return sum(one == other for one, other in zip(first, second, strict=True))

    async def run(self, depths: Sequence[int] = (SYNC, ASYNC)) -> AsyncGenerator[ComparisonStep, None]:
        """Yield where it stands, ten times a second. Closing this generator cancels what runs.

        Raises:
            BackendFailedError: There is no model.
        """
        serving = await self._backend.ready()
        while not self._backend.warm:  # what runs while layers are compiled is slower than it will be
            yield ComparisonStep(depths[0], 0.0, 0.0)
            await asyncio.sleep(_LOOK_SECONDS)
        try:
            for depth in depths:
                async with aclosing(self._run_one(serving, depth)) as steps:
                    async for step in steps:
                        yield step
        finally:
            serving.manager.set_depth(serving.depth)

    async def _run_one(self, serving: Serving, depth: int) -> AsyncGenerator[ComparisonStep, None]:
        manager = serving.manager
        manager.set_depth(depth)
        # Otherwise the second run would find the prompts of the first one in the prefix cache.
        manager.weights_updated()
        before = manager.stats()
        records = _Records(serving, before.steps - 1)
        wall = Wall(serving, self._prompts, self._settings, chats=self._chats, owner=self._owner)
        try:
            while not wall.over:
                await WALLS.run(wall.tick)
                records.read()
                done = wall.tokens / (self._settings.max_new_tokens * len(wall.tiles))
                yield ComparisonStep(depth, min(done, 1.0), wall.tokens / wall.seconds if wall.seconds else 0.0)
                if not wall.over:
                    await asyncio.sleep(_LOOK_SECONDS)
            records.read()
        finally:
            wall.stop()
        after, steps = manager.stats(), records.steps
        seconds = wall.seconds
        traffic = serving.traffic
        assert traffic is not None
        pace = Pace.of(steps, seconds, traffic, serving.machine.copy_bandwidth)
        self._tokens[depth] = [[token for turn in tile.token_ids for token in turn] for tile in wall.tiles]
        self.outcomes[depth] = Outcome(
            depth=depth,
            chats=len(wall.tiles),
            tokens=wall.tokens,
            seconds=seconds,
            tokens_per_second=wall.tokens / seconds,
            ms_per_step=pace.ms_per_step,
            busy_percent=pace.busy_percent,
            host_ms_per_step=pace.host_ms_per_step,
            mbu_percent=pace.mbu_run_percent,
            steps=pace.steps,
            others=after.finished - before.finished - len(wall.tiles) + after.running + after.waiting,
            gpu=serving.on_gpu,
            drawn=drawn_steps(steady_window(steps, DRAWN_STEPS)),
        )
        yield ComparisonStep(depth, 1.0, wall.tokens / seconds)


class _Records:
    """The steps of a run; read on before the engine has forgotten the first of them."""

    def __init__(self, serving: Serving, after: int) -> None:
        self._manager = serving.manager
        self._after = after
        self._lock = threading.Lock()
        self.steps: list[StepRecord] = []

    def read(self) -> None:
        with self._lock:
            new = self._manager.timeline(after=self._after).steps
            if new:
                self.steps += new
                self._after = new[-1].step
