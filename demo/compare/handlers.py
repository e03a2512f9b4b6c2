"""What the buttons of the comparison do, for many visitors at once."""

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
from ..serving.settings import MAX_NEW_TOKENS, clamp
from ..serving.visitor import owner_of, visitor_of
from ..wall.frames import dump
from ..wall.prompts import read_prompts
from ..wall.wall import MOST_CHATS
from .comparison import ASYNC, SYNC, DepthComparison

# A run that takes longer is stopped, so that its place comes to others. What it has made stays.
COMPARE_SECONDS = 600.0
# The value, Run and Stop.
ComparePage = tuple[Any, Any, Any]


class CompareRuns:
    """Comparisons of all visitors: one at a time, since the depth is the whole engine's."""

    def __init__(self, backend: Backend, line: Line) -> None:
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
        depths: Sequence[int] = (SYNC, ASYNC),
        owner: str = "",
    ) -> AsyncIterator[dict[str, Any]]:
        """Run a comparison and yield where it stands; the last one has `over` and all outcomes.

        A comparison that runs for `COMPARE_SECONDS` is stopped: the others wait for it.

        Raises:
            ValueError: There is no prompt.
            LineFullError: Too many wait already.
            BackendFailedError: There is no model.
        """
        stop = self._by_visitor[visitor] = asyncio.Event()
        try:
            async with aclosing(self._states(stop, prompts, chats, max_new_tokens, depths, owner)) as states:
                async for state in states:
                    yield state
        finally:
            if self._by_visitor.get(visitor) is stop:
                del self._by_visitor[visitor]

    async def _states(
        self,
        stop: asyncio.Event,
        prompts: Sequence[str],
        chats: int,
        max_new_tokens: int,
        depths: Sequence[int],
        owner: str,
    ) -> AsyncGenerator[dict[str, Any], None]:
        comparison = DepthComparison(self._backend, prompts, chats=chats, max_new_tokens=max_new_tokens, owner=owner)
        with self._line.join(owner) as ticket:
            while (place := ticket.place) and not stop.is_set():
                yield {"place": place}
                await asyncio.sleep(PLACE_SECONDS)
            expires = time.perf_counter() + COMPARE_SECONDS
            if stop.is_set():
                return
            async with aclosing(comparison.run(depths)) as steps:
                async for step in steps:
                    if stop.is_set() or time.perf_counter() > expires:
                        stop.set()
                        break
                    yield {"depth": step.depth, "done": round(step.done, 3), "speed": round(step.speed, 1)} | (
                        {"outcomes": self._outcomes(comparison)} if comparison.outcomes else {}
                    )
        yield {"over": True, "stopped": stop.is_set(), "same": comparison.same, "outcomes": self._outcomes(comparison)}

    def stop(self, visitor: str) -> None:
        """End this visitor's comparison, if there is one."""
        stop = self._by_visitor.get(visitor)
        if stop is not None:
            stop.set()

    def _outcomes(self, comparison: DepthComparison) -> dict[str, Any]:
        return {str(depth): outcome.as_dict() for depth, outcome in comparison.outcomes.items()}

    # -- the page's events ----------------------------------------------------------------------------------------

    async def on_run(
        self, which: str, chats: float, max_new_tokens: float, prompts: str, request: gr.Request
    ) -> AsyncIterator[ComparePage]:
        """Run the prompts at the depth that is switched on, or at one after the other."""
        depths = {"sync": (SYNC,), "async": (ASYNC,)}.get(str(which), (SYNC, ASYNC))
        yield gr.skip(), gr.update(visible=False), gr.update(visible=True)
        value: Any = gr.skip()
        try:
            async for state in self.states(
                visitor_of(request),
                read_prompts(prompts),
                chats=int(clamp(chats, 1, MOST_CHATS)),
                max_new_tokens=int(clamp(max_new_tokens, 1, MAX_NEW_TOKENS)),
                depths=depths,
                owner=owner_of(request),
            ):
                value = dump(state)
                yield value, gr.skip(), gr.skip()
        except ValueError as error:
            value = dump({"over": True, "problem": str(error)})
        except Exception as error:  # told in the comparison's place
            value = dump({"over": True, "problem": explain(error).plain()})
        yield value, gr.update(visible=True), gr.update(visible=False)

    async def on_stop(self, request: gr.Request) -> None:
        """End the comparison; outcomes that are there stay."""
        self.stop(visitor_of(request))
