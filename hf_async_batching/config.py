"""The engine's settings."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace

import torch

from hf_async_batching.attention.base import BackendName
from hf_async_batching.kv_cache.paged_cache import LayerGroups, LayerShape, group_layers
from hf_async_batching.scheduler.waiting_queue import Admission

logger = logging.getLogger(__name__)

GIB = 1 << 30

CUDA_RESERVE = 3 * GIB // 2
"""Left free on a small card for activations, logits and captured graphs, in bytes."""


def default_page_size(device: torch.device) -> int:
    """Tokens per KV page where nobody chose: on CUDA as many as one block of the decode kernel reads."""
    return 32 if device.type == "cuda" else 256


@dataclass(frozen=True, slots=True)
class BatchingConfig:
    """Settings of a `GenerationManager`. Fields that are None are chosen for the model and the device.

    Attributes:
        depth: Steps in flight at once. 1 is synchronous batching; 2 plans a step while the one before it runs; more
            helps where the host is slower than a step. Default: 2 on CUDA, 1 on the CPU, which runs a step while it
            is being launched. Outputs do not depend on it.
        page_size: Tokens per KV page, a power of two from 16 to 256. Default: 32 on CUDA, 256 on the CPU.
        max_rows: Requests that are computed at the same time. Default: 256 on CUDA, 32 on the CPU.
        max_batch_tokens: Query tokens per step, decoding rows and prompt pieces together. Default: on CUDA 2048 for
            weights of 8 GiB and more, 4096 from 3 GiB, 8192 below; 256 on the CPU; never below `max_rows`.
        max_sequence_length: Tokens that one request may reach, prompt and completion. Default: the model's context
            length.
        num_pages: KV pages, of all layers each. Default: as many as `memory_fraction` allows, but no more than
            `max_rows` requests of `max_sequence_length` tokens can fill.
        memory_fraction: Share of the memory that is free when the engine starts which the KV cache may take. Default:
            0.92 on CUDA, where at least 1.5 GiB are left for the steps themselves; 0.25 on the CPU.
        prefix_cache: Keep full pages of finished and live requests, and let a prompt that begins with the same tokens
            start after them. Outputs do not depend on it. Weights that change in place in a way that torch does not
            count need `GenerationManager.weights_updated()`.
        prompt_lookup_rows: Requests with `prompt_lookup_num_tokens` draft while no more requests than this run, and
            none waits; 0 for never. Outputs do not depend on it.
        admission: Which of the requests that wait starts next. "fcfs": the one that came first. "longest_first": the
            one with the largest `max_new_tokens`, and prompts are computed piece by piece beside rows that decode,
            for work of which only the end counts; first tokens come later. Outputs do not depend on it.
        max_waiting: Requests that may wait for a row; one more raises `QueueFullError`. A `generate` call of more rows
            than this queues them in portions, as room comes.
        idle_timeout: Seconds without work after which the engine stops and returns its memory; the next call starts
            it again. None: never.
        attention_backend: "triton", "torch", or "auto": Triton on CUDA, PyTorch on the CPU.
        cuda_graphs: Capture decode steps as CUDA graphs, and those with few tokens of prompts unless the model is
            spread over ranks. Default: on CUDA.
        compile: Compile the model's layers with torch.compile. Serving starts uncompiled; a thread compiles beside it,
            and the engine changes over when that is done and its logits agree. Default: on CUDA.
        fuse_weights: Let projections of one input (q/k/v, gate/up) share one product. Their weights are moved into
            one tensor, of which the model's own parameters become views; values, `state_dict` and in-place updates
            stay as they are. Also serves few rows by our own kernel. Default: on CUDA.
        attach_check: Compare two short prompts with the plain forward before the first request is served.
        timeline_steps: Steps whose event times are kept for `timeline()` and `stats()`.
        debug: Check the scheduler's bookkeeping after every step.

    Raises:
        ValueError: A field is out of its range; the message names it.
    """

    depth: int | None = None
    page_size: int | None = None
    max_rows: int | None = None
    max_batch_tokens: int | None = None
    max_sequence_length: int | None = None
    num_pages: int | None = None
    memory_fraction: float | None = None
    prefix_cache: bool = True
    prompt_lookup_rows: int = 4
    admission: Admission = "fcfs"
    max_waiting: int = 4096
    idle_timeout: float | None = 60.0
    attention_backend: BackendName = "auto"
    cuda_graphs: bool | None = None
    compile: bool | None = None
    fuse_weights: bool | None = None
    attach_check: bool = True
    timeline_steps: int = 512
    debug: bool = False

    def __post_init__(self) -> None:
        for name in ("depth", "max_rows", "max_batch_tokens", "max_sequence_length", "num_pages", "max_waiting"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if self.prompt_lookup_rows < 0:
            raise ValueError(f"`prompt_lookup_rows` must be 0 or more, got {self.prompt_lookup_rows}")
        if self.page_size is not None and self.page_size not in (16, 32, 64, 128, 256):
            raise ValueError(f"`page_size` must be 16, 32, 64, 128 or 256, got {self.page_size}")
        if self.memory_fraction is not None and not 0.0 < self.memory_fraction <= 1.0:
            raise ValueError(f"`memory_fraction` must be in (0, 1], got {self.memory_fraction}")
        if self.idle_timeout is not None and self.idle_timeout <= 0:
            raise ValueError(f"`idle_timeout` must be above 0 seconds, or None for never, got {self.idle_timeout}")
        if self.attention_backend not in ("auto", "torch", "triton"):
            raise ValueError(
                f"`attention_backend` must be 'auto', 'torch' or 'triton', got {self.attention_backend!r}"
            )
        if self.admission not in ("fcfs", "longest_first"):
            raise ValueError(f"`admission` must be 'fcfs' or 'longest_first', got {self.admission!r}")
        if self.timeline_steps < 1:
            raise ValueError(f"`timeline_steps` must be at least 1, got {self.timeline_steps}")
        if self.max_rows and self.max_batch_tokens and self.max_batch_tokens < self.max_rows:
            raise ValueError(
                f"`max_batch_tokens` ({self.max_batch_tokens}) must be at least `max_rows` ({self.max_rows}): "
                "every decoding row takes one token of the budget"
            )

    def compiles(self, device: torch.device) -> bool:
        """`compile` with its default filled in."""
        return device.type == "cuda" if self.compile is None else self.compile

    def fuses_weights(self, device: torch.device) -> bool:
        """`fuse_weights` with its default filled in."""
        return device.type == "cuda" if self.fuse_weights is None else self.fuse_weights

    def for_ranks(self) -> BatchingConfig:
        """For a model that is spread over ranks: its layers have collectives, and weights that are parts of tensors.

        Raises:
            ValueError: `compile` or `fuse_weights` is asked for.
        """
        for name in ("compile", "fuse_weights"):
            if getattr(self, name):
                raise ValueError(f"`{name}` is not served with tensor parallelism; leave it out")
        return replace(self, compile=False, fuse_weights=False)

    def resolve(
        self,
        layers: list[LayerShape],
        context_length: int | None,
        device: torch.device,
        free_bytes: int,
        weight_bytes: int = 0,
        state_bytes: int = 0,
        groups: LayerGroups | None = None,
    ) -> ResolvedConfig:
        """Fill the automatic fields once, and log each choice with its reason.

        Args:
            layers: Keys and values of the model's attention layers.
            context_length: Tokens the model was built for; None where unknown.
            device: Where the model runs.
            free_bytes: Memory that is free there.
            weight_bytes: Memory of the weights that a step reads.
            state_bytes: Memory of what a row has beside its pages.
            groups: Which layers share a page; None for all.

        Raises:
            ValueError: The KV cache would not hold a single page in what is free.
        """
        cuda = device.type == "cuda"
        why: dict[str, str] = {}

        def choose(name: str, value: int | float, reason: str) -> int | float:
            given: int | float | None = getattr(self, name)
            if given is not None:
                return given
            why[name] = f"{value} ({reason})"
            return value

        kind = "CUDA" if cuda else "CPU"
        depth = int(choose("depth", 2 if cuda else 1, f"default on {kind}"))
        page_size = int(choose("page_size", default_page_size(device), f"default on {kind}"))
        default_rows = 256 if cuda else 32
        if self.max_batch_tokens is not None:
            default_rows = min(default_rows, self.max_batch_tokens)
        max_rows = int(choose("max_rows", default_rows, f"default on {kind}"))
        # Rows that decode wait while prompts are computed, for about as long with any model. On an H200, 2,048 tokens
        # take an 8B model 50 ms, and four times as many gain 1 % of throughput.
        tokens = (2048 if weight_bytes >= 8 * GIB else 4096 if weight_bytes >= 3 * GIB else 8192) if cuda else 256
        reason = f"default on {kind} for {weight_bytes / GIB:.1f} GiB of weights"
        budget = int(choose("max_batch_tokens", max(max_rows, tokens), reason))
        longest = int(
            choose("max_sequence_length", context_length or 4096, "context length" if context_length else "unknown")
        )
        fraction = float(choose("memory_fraction", 0.92 if cuda else 0.25, f"default on {kind}"))
        # Models with states alone have pages that hold nothing.
        groups = groups or group_layers(layers, apart=False)
        page_bytes = max(1, groups.page_bytes(layers, page_size))
        pages_per_row = -(-longest // page_size)
        usable = int(free_bytes * fraction)
        if cuda and self.memory_fraction is None:
            usable = min(usable, free_bytes - CUDA_RESERVE)
        affordable = (usable - (max_rows + 1) * state_bytes) // page_bytes - 1
        useful = pages_per_row * max_rows * groups.count
        num_pages = groups.count * (self.num_pages or 0) or int(
            choose(
                "num_pages",
                min(affordable, useful),
                f"{fraction:.0%} of {free_bytes / GIB:.1f} GiB free at {page_bytes / 1024:.0f} KiB a page"
                if affordable < useful
                else f"{max_rows} rows of {longest} tokens",
            )
        )
        if num_pages < groups.count:
            raise ValueError(
                f"the KV cache needs at least one page of {groups.count * page_bytes / GIB:.3f} GiB, and "
                f"{fraction:.0%} of {free_bytes / GIB:.2f} GiB free memory does not hold it; free memory or raise "
                "`memory_fraction`"
            )
        for name, choice in why.items():
            logger.info("%s = %s", name, choice)
        chosen = replace(
            self,
            depth=depth,
            page_size=page_size,
            max_rows=max_rows,
            max_batch_tokens=budget,
            max_sequence_length=longest,
            num_pages=num_pages // groups.count,
            memory_fraction=fraction,
            compile=self.compiles(device),
            fuse_weights=self.fuses_weights(device),
        )
        reach = min(longest, num_pages // groups.count * page_size)
        return ResolvedConfig(depth, page_size, max_rows, budget, reach, num_pages, pages_per_row, chosen)


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """A `BatchingConfig` whose automatic fields are filled.

    Attributes:
        max_sequence_length: Tokens that one request may reach: bounded by the setting and by the whole cache.
        num_pages: KV pages of a group of layers (see `LayerGroups`), of all groups together.
        pages_per_row: Width of the page table.
        settings: The configuration with its fields filled.
    """

    depth: int
    page_size: int
    max_rows: int
    max_batch_tokens: int
    max_sequence_length: int
    num_pages: int
    pages_per_row: int
    settings: BatchingConfig

    def __str__(self) -> str:
        shown = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "settings"}
        return ", ".join(f"{name}={value}" for name, value in shown.items())
