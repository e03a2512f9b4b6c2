"""Handles the buttons of the wall, for many visitors at once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import gradio as gr

from ..serving.backend import Backend
from ..serving.line import PLACE_SECONDS, Line
from ..serving.pools import WALLS
from ..serving.problems import explain
from ..serving.settings import Settings, clamp
from ..serving.visitor import owner_of, visitor_of
from .frames import Frames, problem_frame, waiting_frame
from .prompts import read_prompts
from .wall import MOST_CHATS, MOST_STAGGER, MOST_TURNS, Wall

# A frame every 80 ms at most: twelve a second.
FRAME_SECONDS = 0.08
# A longer run is stopped and gives its place to others. Its text stays.
WALL_SECONDS = 900.0
# The value, Start, Stop and Add.
WallPage = tuple[Any, Any, Any, Any]


class WallRuns:
    """The walls of all visitors, one per tab. A few run at once, and the others wait and see their place."""

    def __init__(self, backend: Backend, line: Line) -> None:
        self._backend = backend
        self._line = line
        self._by_visitor: dict[str, Frames] = {}
        self._by_run: dict[str, Frames] = {}
        self._stopped: set[str] = set()
        # Walls that run or wait, by visitor. Nothing else is remembered.
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

        A wall is stopped after `WALL_SECONDS`.

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
                await asyncio.sleep(PLACE_SECONDS)
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
                    # A slow tick does not delay the next one.
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
        """Free what a closed tab still uses."""
        self.stop(visitor)

    def add(self, visitor: str, chats: int) -> int:
        """Let more chats join this visitor's wall; return how many did."""
        frames = self._by_visitor.get(visitor)
        return frames.wall.add(chats) if frames is not None else 0

    def whole(self, run: str) -> dict[str, Any]:
        """Return the whole wall, for a page that has missed a frame; empty if the wall is over."""
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
        except Exception as error:  # shown in the wall's place
            frame = problem_frame(explain(error).plain())
        yield frame, *idle

    async def on_stop(self, request: gr.Request) -> None:
        """End all chats of the wall; their text stays."""
        self.stop(visitor_of(request))

    async def on_add(self, request: gr.Request) -> None:
        """Let four more chats join while the others run."""
        self.add(visitor_of(request), 4)
