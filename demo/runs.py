"""What the buttons of the wall and of the comparison do, for many visitors at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import gradio as gr

from .backend import Backend
from .compare import ASYNC, SYNC, Comparison
from .frames import Frames, dump, problem_frame, waiting_frame
from .handlers import visitor_of
from .line import Line
from .problems import explain
from .settings import LONGEST_TEXT, MAX_NEW_TOKENS, Settings
from .wall import MOST_CHATS, MOST_TURNS, Wall

# A frame every 80 ms at most: twelve a second.
FRAME_SECONDS = 0.08
_PLACE_SECONDS = 0.25
_MOST_STAGGER = 5.0
_MOST_PROMPTS = 256
# The value, Start, Stop and Add.
WallPage = tuple[Any, Any, Any, Any]
# The value, Run and Stop.
ComparePage = tuple[Any, Any, Any]


def read_prompts(text: str | Sequence[str]) -> list[str]:
    """One prompt per line; empty lines are none."""
    lines = text.splitlines() if isinstance(text, str) else [str(line) for line in text]
    return [line.strip()[:LONGEST_TEXT] for line in lines if line.strip()][:_MOST_PROMPTS]


class WallRuns:
    """Walls of all visitors, one per tab at a time; a few run at once, and the others wait at a visible place."""

    def __init__(self, backend: Backend, line: Line) -> None:
        self._backend = backend
        self._line = line
        self._by_visitor: dict[str, Frames] = {}
        self._by_run: dict[str, Frames] = {}
        self._stopped: set[str] = set()

    async def frames(
        self,
        visitor: str,
        prompts: Sequence[str],
        settings: Settings,
        *,
        chats: int,
        turns: int = 1,
        stagger: float = 0.0,
    ) -> AsyncIterator[str]:
        """Run a wall and yield its frames. Closing this generator (a closed tab) frees all its rows and pages.

        Raises:
            ValueError: There is no prompt.
            LineFullError: Too many wait already.
            BackendFailedError: There is no model.
        """
        self.stop(visitor)
        self._stopped.discard(visitor)
        with self._line.join() as ticket:
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
            wall = Wall(serving, prompts, settings, chats=chats, turns=turns, stagger=stagger)
            frames = self._by_visitor[visitor] = Frames(wall)
            self._by_run[frames.run] = frames
            try:
                while True:
                    began = time.perf_counter()
                    yield await asyncio.to_thread(frames.next)
                    if wall.over:
                        return
                    # A tick that took long does not make the next one wait.
                    await asyncio.sleep(max(0.0, FRAME_SECONDS - (time.perf_counter() - began)))
            finally:
                wall.stop()
                self._by_run.pop(frames.run, None)
                if self._by_visitor.get(visitor) is frames:
                    del self._by_visitor[visitor]

    def stop(self, visitor: str) -> None:
        """End this visitor's wall, if there is one."""
        self._stopped.add(visitor)
        frames = self._by_visitor.get(visitor)
        if frames is not None:
            frames.wall.stop()

    def leave(self, visitor: str) -> None:
        """Free what a closed tab was still using."""
        self.stop(visitor)
        self._stopped.discard(visitor)

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
                chats=int(min(max(chats or 1, 1), MOST_CHATS)),
                turns=int(min(max(turns or 1, 1), MOST_TURNS)),
                stagger=min(max(stagger or 0.0, 0.0), _MOST_STAGGER),
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
        self._stopped: set[str] = set()

    async def states(
        self,
        visitor: str,
        prompts: Sequence[str],
        *,
        chats: int,
        max_new_tokens: int,
        depths: Sequence[int] = (SYNC, ASYNC),
    ) -> AsyncIterator[dict[str, Any]]:
        """Run a comparison and yield where it stands; the last one has `over` and all outcomes.

        Raises:
            ValueError: There is no prompt.
            LineFullError: Too many wait already.
            BackendFailedError: There is no model.
        """
        self._stopped.discard(visitor)
        comparison = Comparison(self._backend, prompts, chats=chats, max_new_tokens=max_new_tokens)
        with self._line.join() as ticket:
            while place := ticket.place:
                yield {"place": place}
                await asyncio.sleep(_PLACE_SECONDS)
            async with aclosing(comparison.run(depths)) as steps:
                async for step in steps:
                    if visitor in self._stopped:
                        break
                    yield {"depth": step.depth, "done": round(step.done, 3), "speed": round(step.speed, 1)} | (
                        {"outcomes": self._outcomes(comparison)} if comparison.outcomes else {}
                    )
        stopped = visitor in self._stopped
        yield {"over": True, "stopped": stopped, "same": comparison.same, "outcomes": self._outcomes(comparison)}

    def stop(self, visitor: str) -> None:
        """End this visitor's comparison, if there is one."""
        self._stopped.add(visitor)

    def _outcomes(self, comparison: Comparison) -> dict[str, Any]:
        return {str(depth): outcome.as_dict() for depth, outcome in comparison.outcomes.items()}

    # -- the page's events ----------------------------------------------------------------------------------------

    async def on_run(
        self, which: str, chats: float, max_new_tokens: float, prompts: str, request: gr.Request
    ) -> AsyncIterator[ComparePage]:
        """Run the prompts at the depth that is switched on, or at one after the other."""
        depths = {"sync": (SYNC,), "async": (ASYNC,)}.get(which, (SYNC, ASYNC))
        yield gr.skip(), gr.update(visible=False), gr.update(visible=True)
        value: Any = gr.skip()
        try:
            async for state in self.states(
                visitor_of(request),
                read_prompts(prompts),
                chats=int(min(max(chats or 1, 1), MOST_CHATS)),
                max_new_tokens=int(min(max(max_new_tokens or 1, 1), MAX_NEW_TOKENS)),
                depths=depths,
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
