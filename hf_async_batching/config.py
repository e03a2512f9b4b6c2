"""The engine's settings, as the caller sets them. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hf_async_batching.core.suggestions import did_you_mean

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

Admission = Literal["fcfs", "longest_first"]
"""The order in which waiting requests start."""

BackendName = Literal["auto", "torch", "triton"]
"""The implementation of attention."""


def _suggests_names(cls: type[T]) -> type[T]:
    """Have a dataclass answer an unknown argument with the one that was probably meant."""
    construct: Any = cls.__init__
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]

    @wraps(construct)
    def init(self: T, *values: Any, **named: Any) -> None:
        unknown = named.keys() - set(known)
        if unknown:
            raise TypeError(
                f"{cls.__name__}() has no {', '.join(f'`{name}`' for name in sorted(unknown))}"
                + (did_you_mean(sorted(unknown), known) or f"; it has {', '.join(known)}")
            )
        construct(self, *values, **named)

    replaced: Any = init
    cls.__init__ = replaced  # type: ignore[method-assign]
    return cls


@_suggests_names
@dataclass(frozen=True, slots=True)
class BatchingConfig:
    """Settings of a `GenerationManager`. A field that is None gets a default for the model and the device.

    Attributes:
        depth: Steps in flight at once. 1 is synchronous batching; 2 plans a step while the previous one runs; more
            helps if the host is slower than a step. Default: 2 on CUDA, 1 on the CPU, which runs a step during its
            launch. Outputs do not depend on it.
        page_size: Tokens per KV page, a power of two from 16 to 256. Default: 32 on CUDA, 256 on the CPU.
        max_rows: Requests that are computed at the same time. Default: 256 on CUDA, 32 on the CPU.
        max_batch_tokens: Query tokens per step: decoding rows and prompt pieces together. Default: on CUDA 2048 for
            weights of 8 GiB and more, 4096 from 3 GiB, 8192 below; 256 on the CPU; never below `max_rows`.
        max_sequence_length: Longest sequence of a request, in tokens of prompt and completion. Default: the model's
            context length.
        num_pages: Number of KV pages; each holds keys and values of all layers. Default: as many as `memory_fraction`
            allows, but no more than `max_rows` requests of `max_sequence_length` tokens can fill.
        memory_fraction: Share of the free memory at the engine's start that the KV cache may take. Default: 0.92 on
            CUDA, where at least 1.5 GiB stay free for the steps themselves; 0.25 on the CPU.
        prefix_cache: Keep full pages of finished and running requests, so that a prompt that starts with the same
            tokens reuses them. Models whose layers keep states also keep snapshots of these, in up to a quarter of
            the cache's memory. Outputs do not depend on it. Call `GenerationManager.weights_updated()` after changing
            weights in place in a way that torch does not count.
        prompt_lookup_rows: Requests with `prompt_lookup_num_tokens` draft tokens while at most this many requests run
            and none waits; 0 for never. Outputs do not depend on it.
        admission: Which waiting request starts next. "fcfs": the one that came first. "longest_first": the one with
            the largest `max_new_tokens`; prompts are then computed in pieces beside decoding rows. This suits work for
            which only the end counts: first tokens come later. Outputs do not depend on it.
        max_waiting: Requests that may wait for a row; one more raises `QueueFullError`. A `generate` call with more
            rows than this queues them in portions, as room becomes free.
        idle_timeout: Seconds without work after which the engine stops and frees its memory; the next call starts it
            again. None: never.
        attention_backend: "triton", "torch", or "auto": Triton on CUDA, PyTorch on the CPU.
        cuda_graphs: Capture decode steps as CUDA graphs, and steps with few prompt tokens too, unless the model is
            sharded over ranks. Default: on CUDA.
        compile: Compile the model's layers with torch.compile. Serving starts uncompiled while a thread compiles. The
            engine switches over when the compiled logits agree. Default: on CUDA.
        fuse_weights: Let projections of one input (q/k/v, gate/up) share one product. Their weights move into one
            tensor, and the model's own parameters become views of it; values, `state_dict` and in-place updates work
            as before. It also computes few rows with our own kernel. Default: on CUDA.
        latent_pages: Keep latents in pages for layers that expand a latent (multi-head latent attention: DeepSeek-V2
            and V3, GLM-4-MoE-Lite, Kimi, MiniCPM3 and others). False keeps the expanded keys and values, for
            comparisons.
        attach_check: Run the parity check before the first request: compare short prompts with plain `generate`.
        timeline_steps: Number of steps whose event times are kept for `timeline()` and `stats()`.
        debug: Check the scheduler's bookkeeping after every step.

    Raises:
        ValueError: A field is out of range; the message names it.
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
    latent_pages: bool = True
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
        """`compile`, with its default for the device."""
        return device.type == "cuda" if self.compile is None else self.compile

    def fuses_weights(self, device: torch.device) -> bool:
        """`fuse_weights`, with its default for the device."""
        return device.type == "cuda" if self.fuse_weights is None else self.fuse_weights

    def for_ranks(self) -> BatchingConfig:
        """Settings for a model that is sharded over ranks: its layers have collectives, and its weights are shards.

        Raises:
            ValueError: `compile` or `fuse_weights` is set to True.
        """
        for name in ("compile", "fuse_weights"):
            if getattr(self, name):
                raise ValueError(f"`{name}` is not served with tensor parallelism; leave it out")
        return replace(self, compile=False, fuse_weights=False)
