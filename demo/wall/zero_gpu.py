"""ZeroGPU lends a GPU for one call, so one decorated generator starts an engine and runs a whole wall.

A shared engine that runs between requests is not possible there. Comparisons, datasets and a chat that joins a running
batch need a Space with its own GPU. Without the package `spaces` nothing here is used.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hf_async_batching.bench.machine import Machine

from ..serving.pools import WALLS
from ..serving.serving import serve
from ..serving.settings import Settings
from .frames import Frames
from .wall import Wall

if TYPE_CHECKING:
    from ..serving.models import ChatModel

SECONDS = 120
_FRAME_SECONDS = 0.08
# The page cannot ask the other process for missed changes, so frames repeat more.
_REPEATED = 40

# A worker is a fork of this process. It finds its objects here, because only picklable values can be handed over.
_model: ChatModel | None = None


def gpu_decorator() -> Callable[..., Any] | None:
    """Return `spaces.GPU` on a ZeroGPU Space, and None everywhere else."""
    if not os.environ.get("SPACES_ZERO_GPU"):
        return None
    try:
        decorator: Callable[..., Any] = importlib.import_module("spaces").GPU
    except ImportError:
        return None
    return decorator


class ZeroGpu:
    """Runs walls, each with a GPU and an engine of its own.

    Args:
        chat_model: Model and tokenizer, on the device that ZeroGPU provides later.
        decorator: `spaces.GPU`.
    """

    def __init__(self, chat_model: ChatModel, decorator: Callable[..., Any]) -> None:
        global _model
        _model = chat_model
        self._run = decorator(duration=SECONDS)(run_wall)

    async def frames(
        self, prompts: Sequence[str], settings: Settings, *, chats: int, turns: int, stagger: float
    ) -> AsyncGenerator[str, None]:
        """Yield the frames of a wall. Closing this generator ends the wall."""
        frames = self._run(list(prompts), settings, chats, turns, stagger)
        try:
            while (frame := await WALLS.run(next, frames, None)) is not None:
                yield frame
        finally:
            frames.close()


def run_wall(prompts: list[str], settings: Settings, chats: int, turns: int, stagger: float) -> Iterator[str]:
    """Start an engine, run a wall on it, and yield its frames. Runs in a worker that has a GPU."""
    assert _model is not None
    # There is no comparison, so no bandwidth is measured.
    machine = Machine("ZeroGPU", float("inf"), {})
    # There is no time to compile. Weights that were fused here would have to be fused again for the next wall.
    serving = serve(_model, machine, compile=False, fuse_weights=False)
    wall = Wall(serving, prompts, settings, chats=chats, turns=turns, stagger=stagger)
    frames = Frames(wall, repeated=_REPEATED)
    try:
        while True:
            yield frames.next()
            if wall.over:
                return
            time.sleep(_FRAME_SECONDS)
    finally:
        serving.manager.close()
