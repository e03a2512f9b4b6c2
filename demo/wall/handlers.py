"""What the buttons of the wall and of the comparison do, for many visitors at once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import gradio as gr

from ..compare.comparison import ASYNC, SYNC, Comparison
from ..serving.backend import Backend
from ..serving.line import Line
from ..serving.pools import WALLS
from ..serving.problems import explain
from ..serving.settings import LONGEST_TEXT, MAX_NEW_TOKENS, Settings, clamp
from ..serving.visitor import owner_of, visitor_of
from .frames import Frames, dump, problem_frame, waiting_frame
from .wall import MOST_CHATS, MOST_STAGGER, MOST_TURNS, Wall

# A frame every 80 ms at most: twelve a second.
FRAME_SECONDS = 0.08
_PLACE_SECONDS = 0.25
_MOST_PROMPTS = 256
LONGEST_PROMPTS = 100_000
# A run that takes longer is stopped, so that its place comes to others. What it has made stays.
WALL_SECONDS = 900.0
COMPARE_SECONDS = 600.0
# The value, Start, Stop and Add.
WallPage = tuple[Any, Any, Any, Any]
# The value, Run and Stop.
ComparePage = tuple[Any, Any, Any]


def read_prompts(text: str | Sequence[Any]) -> list[str]:
    """Return one prompt per line; empty lines are none. What is beyond `LONGEST_PROMPTS` characters is left out."""
    lines = text[:LONGEST_PROMPTS].splitlines() if isinstance(text, str) else text
    prompts: list[str] = []
    length = 0
    for line in lines:
        prompt = line.strip()[:LONGEST_TEXT] if isinstance(line, str) else ""
        length += len(prompt)
        if len(prompts) == _MOST_PROMPTS or length > LONGEST_PROMPTS:
            break
        if prompt:
            prompts.append(prompt)
    return prompts


class WallRuns:
    """Walls of all visitors, one per tab at a time; a few run at once, and the others wait at a visible place."""

    def __init__(self, backend: Backend, line: Line) -> None:
        self._backend = backend
        self._line = line
        self._by_visitor: dict[str, Frames] = {}
        self._by_run: dict[str, Frames] = {}
        self._stopped: set[str] = set()
        # Walls that run or wait, by visitor: only of these anything is remembered.
        self._inside = Counter[str]()

    async def frames(
        self,
        visitor: str,
        prompts: Sequence[str],
        settings: Settings,
        *,
        chats: int,
        turns: int = 1,
        stagger: float = 0.0,
        owner: str = "",
    ) -> AsyncIterator[str]:
        """Run a wall and yield its frames. Closing this generator (a closed tab) frees all its rows and pages.

        A wall that runs for `WALL_SECONDS` is stopped.

        Raises:
            ValueError: There is no prompt.
            LineFullError: Too many wait already.
            BackendFailedError: There is no model.
        """
        self.stop(visitor)
        self._stopped.discard(visitor)
        self._inside[visitor] += 1
        try:
            async with aclosing(self._frames(visitor, prompts, settings, chats, turns, stagger, owner)) as frames:
                async for frame in frames:
                    yield frame
        finally:
            self._inside[visitor] -= 1
            if not self._inside[visitor]:
                del self._inside[visitor]
                self._stopped.discard(visitor)

    async def _frames(
        self,
        visitor: str,
        prompts: Sequence[str],
        settings: Settings,
        chats: int,
        turns: int,
        stagger: float,
        owner: str,
    ) -> AsyncGenerator[str, None]:
        with self._line.join(owner) as ticket:
            while place := ticket.place:
                yield waiting_frame(place)
                await asyncio.sleep(_PLACE_SECONDS)
                if visitor in self._stopped:
                    return
            if self._backend.zero is not None:
                async with aclosing(
                    self._backend.zero.frames(prompts, settings, chats=chats, turns=turns, stagger=stagger)
                ) as zero_frames:
                    async for frame in zero_frames:
                        if visitor in self._stopped:
                            return
                        yield frame
                return
            serving = await self._backend.ready()
            wall = Wall(serving, prompts, settings, chats=chats, turns=turns, stagger=stagger, owner=owner)
            expires = time.perf_counter() + WALL_SECONDS
            frames = self._by_visitor[visitor] = Frames(wall)
            self._by_run[frames.run] = frames
            try:
                while True:
                    began = time.perf_counter()
                    yield await WALLS.run(frames.next)
                    if wall.over:
                        return
                    if began > expires:
                        wall.stop()
                    # A tick that took long does not make the next one wait.
                    await asyncio.sleep(max(0.0, FRAME_SECONDS - (time.perf_counter() - began)))
            finally:
                wall.stop()
                self._by_run.pop(frames.run, None)
                if self._by_visitor.get(visitor) is frames:
                    del self._by_visitor[visitor]

    def stop(self, visitor: str) -> None:
        """End this visitor's wall, if there is one."""
        if self._inside[visitor]:
            self._stopped.add(visitor)
        frames = self._by_visitor.get(visitor)
        if frames is not None:
            frames.wall.stop()

    def leave(self, visitor: str) -> None:
        """Free what a closed tab was still using."""
        self.stop(visitor)

    def add(self, visitor: str, chats: int) -> int:
        """Let more chats join this visitor's wall; returns how many did."""
        frames = self._by_visitor.get(visitor)
        return frames.wall.add(chats) if frames is not None else 0

    def whole(self, run: str) -> dict[str, Any]:
        """All of a wall, for a page that has missed a frame; empty where it is over."""
        frames = self._by_run.get(run)
        return frames.whole() if frames is not None else {}

    def stop_one(self, run: str, tile: int) -> None:
        """End one chat of a wall."""
        frames = self._by_run.get(run)
        if frames is not None:
            frames.wall.stop(tile)

    # -- the page's events ----------------------------------------------------------------------------------------

    async def on_start(
        self,
        chats: float,
        prompts: str,
        turns: float,
        max_new_tokens: float,
        stagger: float,
        greedy: bool,
        request: gr.Request,
    ) -> AsyncIterator[WallPage]:
        """Start a wall, and stream it."""
        running = (gr.update(visible=False), gr.update(visible=True), gr.update(interactive=True))
        idle = (gr.update(visible=True), gr.update(visible=False), gr.update(interactive=False))
        yield gr.skip(), *running
        frame: Any = gr.skip()
        settings = Settings.within_bounds(max_new_tokens=max_new_tokens, greedy=greedy)
        try:
            async for frame in self.frames(
                visitor_of(request),
                read_prompts(prompts),
                settings,
                chats=int(clamp(chats, 1, MOST_CHATS)),
                turns=int(clamp(turns, 1, MOST_TURNS)),
                stagger=clamp(stagger, 0.0, MOST_STAGGER),
                owner=owner_of(request),
            ):
                yield frame, gr.skip(), gr.skip(), gr.skip()
        except ValueError as error:
            frame = problem_frame(str(error))
        except Exception as error:  # told in the wall's place
            frame = problem_frame(explain(error).plain())
        yield frame, *idle

    async def on_stop(self, request: gr.Request) -> None:
        """End all chats of the wall; what was written stays."""
        self.stop(visitor_of(request))

    async def on_add(self, request: gr.Request) -> None:
        """Let four more chats join while the others run."""
        self.add(visitor_of(request), 4)


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
        comparison = Comparison(self._backend, prompts, chats=chats, max_new_tokens=max_new_tokens, owner=owner)
        with self._line.join(owner) as ticket:
            while (place := ticket.place) and not stop.is_set():
                yield {"place": place}
                await asyncio.sleep(_PLACE_SECONDS)
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

    def _outcomes(self, comparison: Comparison) -> dict[str, Any]:
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
