"""A model, its engine, and the machine under it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import psutil

from hf_async_batching.bench.machine import Machine, look_at
from hf_async_batching.bench.measure import Traffic

from .models import ChatModel, load_chat_model
from .roster import Capacity, Roster

if TYPE_CHECKING:
    from hf_async_batching import GenerationManager

# A comparison needs both depths; a page that serves at depth 1 can still run at 2.
DEEPEST = 2
_TIMELINE_STEPS = 4096
_MAX_WAITING = 512
# On a CPU the KV cache takes so many times the memory of the weights, and at least this many bytes, which hold a wall
# of 64 chats. An engine's default is a quarter of the free memory, but a laptop needs that for other programs.
_CPU_CACHE_PER_WEIGHT = 2
_LEAST_CPU_CACHE = 256 << 20
_MOST_OF_FREE_MEMORY = 0.25

# Called with the number and the text of the stage that begins.
Report = Callable[[int, str], None]


@dataclass(frozen=True)
class Serving:
    """A model and its engine, ready to answer.

    Attributes:
        manager: The engine.
        chat_model: Model and tokenizer.
        machine: Card, versions, measured copy bandwidth.
        depth: Steps in flight while no comparison runs.
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
        """The bytes that a step must read; None while the engine does not run."""
        assembly = self.manager.assembly
        return Traffic.of(assembly) if assembly is not None else None

    @cached_property
    def size(self) -> str:
        """The number of the model's parameters, in words."""
        return size_of(sum(weight.numel() for weight in self.chat_model.model.parameters()))

    def facts(self) -> list[tuple[str, str]]:
        """Return the page's line of facts as (name, value); a fact without a name is a sentence."""
        machine = self.machine
        versions = [(name, machine.versions[name] or "") for name in ("torch", "transformers")]
        return [
            ("Model", self.chat_model.name),
            ("Size", self.size),
            ("on", machine.card),
            ("in", str(self.chat_model.model.dtype).removeprefix("torch.")),
            ("copy bandwidth", f"{machine.copy_bandwidth / 1e9:,.0f} GB/s"),
            *versions,
            ("", self.chat_model.source),
        ]


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


def size_of(parameters: int) -> str:
    """Return a number of parameters in words."""
    for unit, word in ((10**9, "billion"), (10**6, "million")):
        if parameters >= unit:
            return f"{parameters / unit:.{1 if parameters < 10 * unit else 0}f} {word} parameters"
    return f"{parameters:,} parameters"


def cpu_cache_share(weight_bytes: int, free_bytes: int) -> float:
    """Return the share of the free memory that the KV cache may take on a CPU."""
    wanted = max(_LEAST_CPU_CACHE, _CPU_CACHE_PER_WEIGHT * weight_bytes)
    return min(_MOST_OF_FREE_MEMORY, wanted / free_bytes)


def serve(chat_model: ChatModel, machine: Machine, *, depth: int | None = None, **settings: object) -> Serving:
    """Start an engine for a model.

    Args:
        chat_model: Model and tokenizer.
        machine: The machine under them.
        depth: Steps in flight; None for the device's default, which is 2 on a GPU and 1 on a CPU.
        settings: More fields of `BatchingConfig`.
    """
    from hf_async_batching import BatchingConfig, GenerationManager

    usual = depth or (2 if chat_model.model.device.type == "cuda" else 1)
    defaults: dict[str, object] = {
        "depth": max(usual, DEEPEST),
        # The page keeps its engine, so that a visitor who comes back need not wait for a start.
        "idle_timeout": None,
        "max_waiting": _MAX_WAITING,
        "timeline_steps": _TIMELINE_STEPS,
    }
    if chat_model.model.device.type == "cpu":
        # Rows for a whole wall and for other visitors beside it. Pages are small enough that a chat's next turn finds
        # those of the last turn.
        defaults |= {"max_rows": 80, "page_size": 64}
        if "num_pages" not in settings:
            weights = sum(weight.nbytes for weight in chat_model.model.parameters())
            defaults["memory_fraction"] = cpu_cache_share(weights, psutil.virtual_memory().available)
    manager = GenerationManager(chat_model.model, BatchingConfig(**{**defaults, **settings}))  # type: ignore[arg-type]
    manager.set_depth(usual)
    prompt = chat_model.tokenizer("Hello").input_ids or [0]
    manager.submit(prompt, max_new_tokens=2, do_sample=False).result()
    assembly = manager.assembly
    assert assembly is not None
    config = assembly.config
    capacity = Capacity(config.max_rows, config.num_pages * config.page_size, config.max_batch_tokens)
    return Serving(manager, chat_model, machine, usual, Roster(capacity))
