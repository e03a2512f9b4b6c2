"""Times the same prompts with plain `generate`, and on the engine at depth 1 and at depth 2."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Any

from hf_async_batching.bench.measure import Pace
from hf_async_batching.core.timeline import StepRecord
from hf_async_batching.core.timeline_picture import steady_window

from ..chat.messages import Message
from ..serving.backend import Backend
from ..serving.pools import RACES, WALLS
from ..serving.pulse import drawn_steps
from ..serving.serving import Serving
from ..serving.settings import Settings
from ..serving.text import build_prompt
from ..wall.wall import Wall
from .plain import PlainGenerate

SYNC, ASYNC = 1, 2
ONE_BY_ONE, PADDED = "one", "padded"
# A way to answer: a depth of the engine, or a kind of plain `generate`.
Way = int | str
DRAWN_STEPS = 10
_LOOK_SECONDS = 0.1
# Lengths of answers in a race, as parts of the longest: real answers differ in length.
_LENGTHS = (1.0, 0.25, 0.5, 0.125, 0.75)


@dataclass(frozen=True)
class Outcome:
    """Figures of one run.

    Attributes:
        depth: Steps in flight: 1 is synchronous.
        chats: Conversations, all there at the start.
        tokens: New tokens.
        seconds: From the first question to the last token.
        tokens_per_second: `tokens` over `seconds`.
        ms_per_step: Mean time per step, idle gaps included.
        busy_percent: Share of the time between the first and the last step in which a step was computed.
        host_ms_per_step: Time for planning, launching and settling, without waiting.
        mbu_percent: Bytes that the steps had to read, divided by `seconds` and by the measured copy bandwidth.
        steps: Steps.
        others: Requests of others in the same batch: they ended meanwhile, or were live at the end.
        gpu: Whether the run was on a GPU. On a CPU nothing overlaps.
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
        """Return the figures for JSON, rounded to the digits that mean something."""
        return {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class PlainOutcome:
    """Figures of a run of plain `generate`; see `Outcome`."""

    chats: int
    tokens: int
    seconds: float
    tokens_per_second: float
    others: int
    gpu: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON, rounded to the digits that mean something."""
        return {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class ComparisonStep:
    """Progress of a comparison.

    Attributes:
        way: The way that runs.
        done: Finished part, from 0 to 1.
        speed: Tokens per second up to now.
        seconds: Time up to now.
    """

    way: Way
    done: float
    speed: float
    seconds: float = 0.0


def limits_of(chats: int, longest: int) -> list[int]:
    """Return the token limit of each question in a race."""
    return [max(1, round(longest * _LENGTHS[index % len(_LENGTHS)])) for index in range(chats)]


class Comparison:
    """Answers prompts in one way after the other, then restores the usual depth.

    Args:
        backend: What answers.
        prompts: First questions.
        chats: How many conversations.
        max_new_tokens: Longest answer. Answers are greedy, so that all runs have the same work to do.
        owner: The address of the visitor.
        ragged: Whether answers have different limits, up to `max_new_tokens`, as in a race.

    Attributes:
        outcomes: Figures of the finished runs, by way.
        same: How many conversations had the same tokens in every way; None before there are two outcomes.
    """

    def __init__(
        self,
        backend: Backend,
        prompts: Sequence[str],
        *,
        chats: int,
        max_new_tokens: int,
        owner: str = "",
        ragged: bool = False,
    ) -> None:
        if not prompts:
            raise ValueError("There is no prompt: write at least one line.")
        self._limits = limits_of(chats, max_new_tokens) if ragged else [max_new_tokens] * chats
        self._backend = backend
        self._prompts = prompts
        self._chats = chats
        self._owner = owner
        self._settings = replace(Settings(), max_new_tokens=max_new_tokens, greedy=True)
        self._tokens: dict[Way, list[list[int]]] = {}
        self.outcomes: dict[Way, Outcome | PlainOutcome] = {}

    @property
    def same(self) -> int | None:
        """How many conversations had the same tokens in every way; None where fewer than two have run."""
        if len(self._tokens) < 2:
            return None
        return sum(all(one == other for other in others) for one, *others in zip(*self._tokens.values(), strict=True))

    async def run(self, ways: Sequence[Way] = (SYNC, ASYNC)) -> AsyncGenerator[ComparisonStep, None]:
        """Yield the progress ten times a second. Closing this generator cancels the current run.

        Raises:
            BackendFailedError: There is no model.
        """
        serving = await self._backend.ready()
        while not self._backend.warm:  # a run beside the compiler is slower than later runs
            yield ComparisonStep(ways[0], 0.0, 0.0)
            await asyncio.sleep(_LOOK_SECONDS)
        try:
            for way in ways:
                runs = self._run_plain(serving, way) if isinstance(way, str) else self._run_depth(serving, way)
                async with aclosing(runs) as steps:
                    async for step in steps:
                        yield step
        finally:
            serving.manager.set_depth(serving.depth)

    async def _run_plain(self, serving: Serving, way: str) -> AsyncGenerator[ComparisonStep, None]:
        tokenizer = serving.chat_model.tokenizer
        chosen = [self._prompts[index % len(self._prompts)] for index in range(self._chats)]
        questions: list[list[Message]] = [[Message(role="user", content=text)] for text in chosen]
        prompts = [build_prompt(tokenizer, question, self._settings.system) for question in questions]
        plain = PlainGenerate(serving.chat_model, prompts, self._limits)
        before = serving.manager.stats()
        began = time.perf_counter()
        task = asyncio.ensure_future(RACES.run(plain.run, 1 if way == ONE_BY_ONE else self._chats))
        try:
            while not task.done():
                seconds = time.perf_counter() - began
                yield ComparisonStep(way, min(plain.tokens / sum(self._limits), 1.0), plain.tokens / seconds, seconds)
                await asyncio.wait((task,), timeout=_LOOK_SECONDS)
            await task
        finally:
            plain.stop()
        after = serving.manager.stats()
        self._tokens[way] = plain.token_ids
        self.outcomes[way] = PlainOutcome(
            chats=len(prompts),
            tokens=plain.tokens,
            seconds=plain.seconds,
            tokens_per_second=plain.tokens / plain.seconds,
            others=after.finished - before.finished + after.running + after.waiting,
            gpu=serving.on_gpu,
        )
        yield ComparisonStep(way, 1.0, plain.tokens / plain.seconds, plain.seconds)

    async def _run_depth(self, serving: Serving, depth: int) -> AsyncGenerator[ComparisonStep, None]:
        manager = serving.manager
        manager.set_depth(depth)
        # Otherwise the second run would find the first run's prompts in the prefix cache.
        manager.weights_updated()
        before = manager.stats()
        records = _Records(serving, before.steps - 1)
        limits = self._limits
        wall = Wall(serving, self._prompts, self._settings, chats=self._chats, owner=self._owner, limits=limits)
        try:
            while not wall.over:
                await WALLS.run(wall.tick)
                records.read()
                speed = wall.tokens / wall.seconds if wall.seconds else 0.0
                yield ComparisonStep(depth, min(wall.tokens / sum(limits), 1.0), speed, wall.seconds)
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
        yield ComparisonStep(depth, 1.0, wall.tokens / seconds, seconds)


class _Records:
    """The steps of a run; reads new ones before the engine drops them."""

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
