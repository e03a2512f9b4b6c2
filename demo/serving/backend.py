"""Loads the model and its engine in a thread while the page is already served."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import NamedTuple, Protocol

from .errors import BackendFailedError
from .models import ModelLoadError
from .serving import Report, Serving
from .settings import Settings

logger = logging.getLogger(__name__)

ONLY_WALLS = (
    "On ZeroGPU there is a GPU only while a wall runs, so start a wall. Your own chat, races and datasets need a "
    "Space with its own GPU."
)


class LoadingStage(NamedTuple):
    """How far loading has come. `number` counts from 1 to `STAGES`, and is `STAGES + 1` when all is done."""

    number: int
    text: str
    failed: bool = False


STAGES = 4


class WallRunner(Protocol):
    """Runs whole walls on a Space that keeps no engine between requests."""

    def frames(
        self, prompts: Sequence[str], settings: Settings, *, chats: int, turns: int, stagger: float
    ) -> AsyncGenerator[str, None]:
        """Yield the frames of a wall. Closing the generator ends the wall."""
        ...


class Backend:
    """Holds the model and its engine once they are loaded. Methods may be called from any thread.

    Args:
        serving: A model and engine that are loaded already.
        zero: Runs walls on a ZeroGPU Space, which serves nothing else.
    """

    def __init__(self, serving: Serving | None = None, zero: WallRunner | None = None) -> None:
        self._serving = serving
        self.zero = zero
        self._stage = LoadingStage(STAGES + 1, "Ready") if serving or zero else LoadingStage(1, "Starting")
        self._settled = threading.Event()
        self._warm = threading.Event()
        if serving is not None or zero is not None:
            self._settled.set()
            self._warm.set()

    @property
    def serving(self) -> Serving | None:
        """The model and its engine; None while they load, and if loading failed."""
        return self._serving

    @property
    def stage(self) -> LoadingStage:
        """How far loading has come."""
        return self._stage

    @property
    def warm(self) -> bool:
        """Whether everything is compiled and captured; earlier figures are too low."""
        return self._warm.is_set()

    async def ready(self) -> Serving:
        """Wait for the model and its engine.

        Raises:
            BackendFailedError: Loading failed.
        """
        while not self._settled.is_set():
            await asyncio.sleep(0.1)
        return self.require()

    def require(self) -> Serving:
        """Return the model and its engine without waiting.

        Raises:
            BackendFailedError: They are still loading, or loading failed.
        """
        if self.zero is not None:
            raise BackendFailedError(ONLY_WALLS)
        if self._serving is None:
            raise BackendFailedError(self._stage.text if self._stage.failed else "The model is still being loaded.")
        return self._serving

    def start(self, load: Callable[[Report], Serving]) -> None:
        """Load in a thread; `load` reports each stage as it begins."""
        threading.Thread(target=self._load, args=(load,), name="demo-loader", daemon=True).start()

    def _load(self, load: Callable[[Report], Serving]) -> None:
        try:
            self._serving = load(self._report)
            self._settled.set()
            self._report(STAGES, "Compiling and capturing; chats work already")
            # Most answers use the page's default settings, so warm these up.
            self._serving.manager.warmup([Settings().request([0], ())])
            self._stage = LoadingStage(STAGES + 1, "Ready")
            self._warm.set()
        except Exception as error:  # the page says so, and stays
            logger.exception("The model or its engine did not come up.")
            text = str(error) if isinstance(error, ModelLoadError) else f"{type(error).__name__}: {error}"
            self._stage = LoadingStage(self._stage.number, text, failed=True)
            self._serving = None
        finally:
            self._settled.set()

    def _report(self, number: int, text: str) -> None:
        logger.info("%d/%d %s", number, STAGES, text)
        self._stage = LoadingStage(number, text)

    def close(self) -> None:
        """Stop the engine."""
        if self._serving is not None:
            self._serving.manager.close()
