"""The model and its engine, which come up in a thread while the page is there already."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hf_async_batching.bench.machine import Machine, look_at
from hf_async_batching.bench.measure import Traffic

from .models import ChatModel, ModelLoadError, load_chat_model
from .roster import Roster

if TYPE_CHECKING:
    from hf_async_batching import GenerationManager

logger = logging.getLogger(__name__)

# Comparing needs both; a page that serves at depth 1 can still run at 2.
DEEPEST = 2
_TIMELINE_STEPS = 4096
_MAX_WAITING = 512

Report = Callable[[int, str], None]


class Stage(NamedTuple):
    """How far loading has come. `number` counts from 1 to `STAGES`, and is `STAGES + 1` when all is done."""

    number: int
    text: str
    failed: bool = False


STAGES = 4


class BackendFailedError(RuntimeError):
    """The model or the engine did not come up; the message says why."""


@dataclass(frozen=True)
class Serving:
    """What answers.

    Attributes:
        manager: The engine.
        chat_model: Model and tokenizer.
        machine: Card, versions, measured copy bandwidth.
        depth: Steps in flight while nobody compares.
        roster: The requests of all visitors.
    """

    manager: GenerationManager
    chat_model: ChatModel
    machine: Machine
    depth: int
    roster: Roster

    @property
    def on_gpu(self) -> bool:
        """Whether the engine runs on a GPU."""
        return self.chat_model.model.device.type == "cuda"

    @property
    def traffic(self) -> Traffic | None:
        """What a step must read; None while the engine does not run."""
        assembly = self.manager.assembly
        return Traffic.of(assembly) if assembly is not None else None

    def facts(self) -> list[tuple[str, str]]:
        """What stands in the page's line of facts: (name, value); a fact without a name is a sentence."""
        machine = self.machine
        versions = [(name, machine.versions[name] or "") for name in ("torch", "transformers")]
        return [
            ("Model", self.chat_model.name),
            ("on", machine.card),
            ("in", str(self.chat_model.model.dtype).removeprefix("torch.")),
            ("copy bandwidth", f"{machine.copy_bandwidth / 1e9:,.0f} GB/s"),
            *versions,
            ("", self.chat_model.source),
        ]


class Backend:
    """Holds what answers, as soon as it is there. Its methods may be called from any thread."""

    def __init__(self, serving: Serving | None = None) -> None:
        self._serving = serving
        self._stage = Stage(STAGES + 1, "Ready") if serving else Stage(1, "Starting")
        self._settled = threading.Event()
        self._warm = threading.Event()
        if serving is not None:
            self._settled.set()
            self._warm.set()

    @property
    def serving(self) -> Serving | None:
        """What answers; None while it is loaded, and where that has failed."""
        return self._serving

    @property
    def stage(self) -> Stage:
        """How far loading has come."""
        return self._stage

    @property
    def warm(self) -> bool:
        """Whether everything is compiled and captured: figures from before would be too low."""
        return self._warm.is_set()

    async def ready(self) -> Serving:
        """Wait for what answers.

        Raises:
            BackendFailedError: It did not come up.
        """
        while not self._settled.is_set():
            await asyncio.sleep(0.1)
        return self.require()

    def require(self) -> Serving:
        """What answers, without waiting.

        Raises:
            BackendFailedError: It is not there yet, or did not come up.
        """
        if self._serving is None:
            raise BackendFailedError(self._stage.text if self._stage.failed else "The model is still being loaded.")
        return self._serving

    def start(self, load: Callable[[Report], Serving]) -> None:
        """Load in a thread; `load` reports the stage that begins."""
        threading.Thread(target=self._load, args=(load,), name="demo-loader", daemon=True).start()

    def _load(self, load: Callable[[Report], Serving]) -> None:
        try:
            self._serving = load(self._report)
            self._settled.set()
            self._report(STAGES, "Compiling and capturing; chats work already")
            self._serving.manager.warmup()
            self._stage = Stage(STAGES + 1, "Ready")
            self._warm.set()
        except Exception as error:  # the page says so, and stays
            logger.exception("The model or its engine did not come up.")
            text = str(error) if isinstance(error, ModelLoadError) else f"{type(error).__name__}: {error}"
            self._stage = Stage(self._stage.number, text, failed=True)
            self._serving = None
        finally:
            self._settled.set()

    def _report(self, number: int, text: str) -> None:
        logger.info("%d/%d %s", number, STAGES, text)
        self._stage = Stage(number, text)

    def close(self) -> None:
        """Stop the engine."""
        if self._serving is not None:
            self._serving.manager.close()


def load(
    report: Report,
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    depth: int | None = None,
) -> Serving:
    """Load a model and start its engine; see `load_chat_model` for the arguments and what it raises."""
    report(1, f"Loading {model or 'the model'}")
    chat_model = load_chat_model(model, device=device, dtype=dtype)
    report(2, "Measuring the memory's bandwidth")
    machine = look_at(chat_model.model.device)
    report(3, "Starting the engine")
    return serve(chat_model, machine, depth=depth)


def serve(chat_model: ChatModel, machine: Machine, *, depth: int | None = None, **settings: object) -> Serving:
    """Start an engine for a model.

    Args:
        chat_model: What to serve.
        machine: Where it runs.
        depth: Steps in flight; None for the device's default, which is 2 on a GPU and 1 on a CPU.
        settings: More fields of `BatchingConfig`.
    """
    from hf_async_batching import BatchingConfig, GenerationManager

    usual = depth or (2 if chat_model.model.device.type == "cuda" else 1)
    defaults: dict[str, object] = {
        "depth": max(usual, DEEPEST),
        # A page that stands open keeps its engine: a visitor who comes back should not wait for it to start again.
        "idle_timeout": None,
        "max_waiting": _MAX_WAITING,
        "timeline_steps": _TIMELINE_STEPS,
    }
    manager = GenerationManager(chat_model.model, BatchingConfig(**{**defaults, **settings}))  # type: ignore[arg-type]
    manager.set_depth(usual)
    prompt = chat_model.tokenizer("Hello").input_ids or [0]
    manager.submit(prompt, max_new_tokens=2, do_sample=False).result()
    return Serving(manager, chat_model, machine, usual, Roster())
