"""Handles the buttons of the comparison, for many visitors at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import gradio as gr

from ..serving.backend import Backend
from ..serving.line import PLACE_SECONDS, Line
from ..serving.problems import explain
from ..serving.settings import clamp
from ..serving.visitor import owner_of, visitor_of
from ..wall.frames import dump
from .comparison import ASYNC, ONE_BY_ONE, PADDED, SYNC, Comparison, Way

# A longer run is stopped and gives its place to others. Its finished part stays.
COMPARE_SECONDS = 600.0
# The ways of a race, in the order in which they run, and its bounds. Plain `generate` pads, so a race has few
# questions, and all of them are the page's own.
RACE: tuple[Way, ...] = (ONE_BY_ONE, PADDED, SYNC, ASYNC)
RACE_QUESTIONS, RACE_TOKENS = 16, 128
# The value, Run and Stop.
ComparePage = tuple[Any, Any, Any]


class CompareRuns:
    """Runs the comparisons of all visitors, one at a time, because the depth holds for the whole engine.

    Args:
        backend: What answers.
        line: The order of visitors.
        questions: The questions of a race.
    """

    def __init__(self, backend: Backend, line: Line, questions: Sequence[str] = ()) -> None:
        self._questions = questions
        self._backend = backend
        self._line = line
        self._by_visitor: dict[str, asyncio.Event] = {}

    async def states(
        self,
        visitor: str,
        prompts: Sequence[str],
        *,
        chats: int,
        max_new_tokens: int,
        ways: Sequence[Way] = (SYNC, ASYNC),
        owner: str = "",
        ragged: bool = False,
    ) -> AsyncIterator[dict[str, Any]]:
        """Run a comparison and yield its progress; the last item has `over` and all outcomes.

        A comparison is stopped after `COMPARE_SECONDS`, because other visitors wait for it.

        Raises:
            ValueError: There is no prompt.
            LineFullError: Too many wait already.
            BackendFailedError: There is no model.
        """
        comparison = Comparison(
            self._backend, prompts, chats=chats, max_new_tokens=max_new_tokens, owner=owner, ragged=ragged
        )
        stop = self._by_visitor[visitor] = asyncio.Event()
        try:
            async with aclosing(self._states(comparison, stop, ways, owner)) as states:
                async for state in states:
                    yield state
        finally:
            if self._by_visitor.get(visitor) is stop:
                del self._by_visitor[visitor]

    async def _states(
        self, comparison: Comparison, stop: asyncio.Event, ways: Sequence[Way], owner: str
    ) -> AsyncGenerator[dict[str, Any], None]:
        with self._line.join(owner) as ticket:
            while (place := ticket.place) and not stop.is_set():
                yield {"place": place}
                await asyncio.sleep(PLACE_SECONDS)
            expires = time.perf_counter() + COMPARE_SECONDS
            if stop.is_set():
                return
            async with aclosing(comparison.run(ways)) as steps:
                async for step in steps:
                    if stop.is_set() or time.perf_counter() > expires:
                        stop.set()
                        break
                    state: dict[str, Any] = {"depth": step.way} if isinstance(step.way, int) else {}
                    state |= {"way": str(step.way), "done": round(step.done, 3), "speed": round(step.speed, 1)}
                    state["seconds"] = round(step.seconds, 2)
                    yield state | ({"outcomes": self._outcomes(comparison)} if comparison.outcomes else {})
        yield {"over": True, "stopped": stop.is_set(), "same": comparison.same, "outcomes": self._outcomes(comparison)}

    def stop(self, visitor: str) -> None:
        """End this visitor's comparison, if there is one."""
        stop = self._by_visitor.get(visitor)
        if stop is not None:
            stop.set()

    def _outcomes(self, comparison: Comparison) -> dict[str, Any]:
        return {str(way): outcome.as_dict() for way, outcome in comparison.outcomes.items()}

    # -- the page's events ----------------------------------------------------------------------------------------

    async def on_race(self, chats: float, max_new_tokens: float, request: gr.Request) -> AsyncIterator[ComparePage]:
        """Run a race: the page's questions in all ways, one after the other."""
        yield gr.skip(), gr.update(visible=False), gr.update(visible=True)
        value: Any = gr.skip()
        try:
            async for state in self.states(
                visitor_of(request),
                self._questions,
                chats=int(clamp(chats, 1, RACE_QUESTIONS)),
                max_new_tokens=int(clamp(max_new_tokens, 1, RACE_TOKENS)),
                ways=RACE,
                owner=owner_of(request),
                ragged=True,
            ):
                value = dump(state)
                yield value, gr.skip(), gr.skip()
        except ValueError as error:
            value = dump({"over": True, "problem": str(error)})
        except Exception as error:  # shown in the comparison's place
            value = dump({"over": True, "problem": explain(error).plain()})
        yield value, gr.update(visible=True), gr.update(visible=False)

    async def on_stop(self, request: gr.Request) -> None:
        """End the comparison; finished outcomes stay."""
        self.stop(visitor_of(request))
