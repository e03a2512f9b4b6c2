"""Sizes of an engine: fills the automatic settings for a model, a device and its free memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace

import torch

from hf_async_batching.config import BatchingConfig
from hf_async_batching.core.graph_buckets import largest_padding
from hf_async_batching.core.row_layout import HISTORY_START, MAX_PADDING
from hf_async_batching.core.step_layout import NO_PADDING, Padding, Sections
from hf_async_batching.experts.recognise import idle_bytes
from hf_async_batching.kv_cache.layer_groups import LayerGroups, LayerShape, group_layers
from hf_async_batching.model.forward.cache_forward import CacheForward
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.scheduler.prompt_lookup import MAX_DRAFTED

logger = logging.getLogger(__name__)

GIB = 1 << 30

SNAPSHOTS_OF_A_ROW = 4
"""Places for snapshots of states, per row."""

_SNAPSHOT_SHARE = 4
"""Places take at most one part in this many of the memory that rows' states leave; KV pages take the rest."""

CUDA_RESERVE = 3 * GIB // 2
"""Bytes left free on a small card, for activations, logits and captured graphs."""


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """A `BatchingConfig` whose automatic fields are filled.

    Attributes:
        max_sequence_length: Tokens that one request may reach: bounded by the setting and by the whole cache.
        num_pages: KV pages of a group of layers (see `LayerGroups`), of all groups together.
        pages_per_row: Width of the page table.
        num_snapshots: Places for snapshots of rows' states (see `state_snapshots`).
        settings: The configuration with its fields filled.
    """

    depth: int
    page_size: int
    max_rows: int
    max_batch_tokens: int
    max_sequence_length: int
    num_pages: int
    pages_per_row: int
    num_snapshots: int
    settings: BatchingConfig

    def __str__(self) -> str:
        shown = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "settings"}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


def default_page_size(device: torch.device) -> int:
    """Tokens per KV page if the caller chose none: on CUDA as many as one block of the decode kernel reads."""
    return 32 if device.type == "cuda" else 256


def resolve_config(
    config: BatchingConfig,
    layers: list[LayerShape],
    context_length: int | None,
    device: torch.device,
    free_bytes: int,
    weight_bytes: int = 0,
    state_bytes: int = 0,
    groups: LayerGroups | None = None,
    *,
    snapshots: bool = False,
) -> ResolvedConfig:
    """Fill the automatic settings once, and log each choice with its reason.

    Args:
        config: The caller's settings.
        layers: Shapes of keys and values, by attention layer.
        context_length: The model's context length in tokens; None if it is unknown.
        device: The model's device.
        free_bytes: Free memory on that device.
        weight_bytes: Memory of the weights that a step reads.
        state_bytes: Memory per row outside its pages.
        groups: The layers that share a page; None for all layers.
        snapshots: Whether the states of a row can be copied.

    Raises:
        ValueError: The free memory does not hold a single KV page.
    """
    cuda = device.type == "cuda"
    why: dict[str, str] = {}

    def choose(name: str, value: int | float, reason: str) -> int | float:
        given: int | float | None = getattr(config, name)
        if given is not None:
            return given
        why[name] = f"{value} ({reason})"
        return value

    kind = "CUDA" if cuda else "CPU"
    depth = int(choose("depth", 2 if cuda else 1, f"default on {kind}"))
    page_size = int(choose("page_size", default_page_size(device), f"default on {kind}"))
    default_rows = 256 if cuda else 32
    if config.max_batch_tokens is not None:
        default_rows = min(default_rows, config.max_batch_tokens)
    max_rows = int(choose("max_rows", default_rows, f"default on {kind}"))
    # Decoding rows wait while prompts are computed. These defaults make them wait about equally long with any model.
    # On an H200, 2,048 tokens take an 8B model 50 ms, and four times as many gain 1 % of throughput.
    tokens = (2048 if weight_bytes >= 8 * GIB else 4096 if weight_bytes >= 3 * GIB else 8192) if cuda else 256
    reason = f"default on {kind} for {weight_bytes / GIB:.1f} GiB of weights"
    budget = int(choose("max_batch_tokens", max(max_rows, tokens), reason))
    longest = int(
        choose("max_sequence_length", context_length or 4096, "context length" if context_length else "unknown")
    )
    fraction = float(choose("memory_fraction", 0.92 if cuda else 0.25, f"default on {kind}"))
    # Models with only states have pages that hold nothing.
    groups = groups or group_layers(layers, apart=False)
    page_bytes = max(1, groups.page_bytes(layers, page_size))
    pages_per_row = -(-longest // page_size)
    usable = int(free_bytes * fraction)
    if cuda and config.memory_fraction is None:
        usable = min(usable, free_bytes - CUDA_RESERVE)
    left = usable - (max_rows + 1) * state_bytes
    num_snapshots = 0
    if state_bytes and snapshots and config.prefix_cache:
        share = left // _SNAPSHOT_SHARE
        if config.num_pages is not None:
            share = min(share, left - config.num_pages * groups.count * page_bytes)
        num_snapshots = max(0, min(SNAPSHOTS_OF_A_ROW * max_rows, share // state_bytes))
    affordable = (left - num_snapshots * state_bytes) // page_bytes - 1
    useful = pages_per_row * max_rows * groups.count
    num_pages = groups.count * (config.num_pages or 0) or int(
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
            f"{fraction:.0%} of {free_bytes / GIB:.2f} GiB free memory is too little; free memory or raise "
            "`memory_fraction`"
        )
    for name, choice in why.items():
        logger.info("%s = %s", name, choice)
    chosen = replace(
        config,
        depth=depth,
        page_size=page_size,
        max_rows=max_rows,
        max_batch_tokens=budget,
        max_sequence_length=longest,
        num_pages=num_pages // groups.count,
        memory_fraction=fraction,
        compile=config.compiles(device),
        fuse_weights=config.fuses_weights(device),
    )
    reach = min(longest, num_pages // groups.count * page_size)
    return ResolvedConfig(depth, page_size, max_rows, budget, reach, num_pages, pages_per_row, num_snapshots, chosen)


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """Sizes of an engine's parts, which the parts share.

    Attributes:
        config: The settings with their automatic fields filled.
        groups: The layers that share a page.
        drafted: Drafted tokens that a row can have in a step.
        padding: The largest size to which a step is padded.
        max_writes: Numbers that a step can write for one row: its rules, its padding, and all of its tokens if their
            pages were found in the prefix cache.
    """

    config: ResolvedConfig
    groups: LayerGroups
    drafted: int
    padding: Padding
    max_writes: int

    @property
    def max_samples(self) -> int:
        """Tokens that a step can sample."""
        return self.config.max_rows + self.drafted

    @property
    def limits(self) -> Sections:
        """The largest sections of a step's inputs."""
        return Sections.largest(
            max_rows=self.config.max_rows,
            max_batch_tokens=max(self.config.max_batch_tokens, self.padding.tokens),
            num_pages=self.config.num_pages,
            writes=self.max_writes,
            drafted=max(self.drafted, self.padding.sections.samples - self.config.max_rows),
        )


def size_engine(
    config: BatchingConfig,
    forward: PackedForward | CacheForward,
    context_length: int | None,
    free_bytes: int,
    *,
    padded: bool = True,
) -> EngineSizes:
    """Choose the sizes of an engine for a forward.

    Args:
        config: The caller's settings.
        forward: The forward that the engine runs.
        context_length: The model's context length in tokens; None if it is unknown.
        free_bytes: Free memory on the forward's device.
        padded: Whether mixed steps may be padded, for graphs. All ranks must capture a step or none, but each rank
            would count the memory of its own graphs. So mixed steps of several ranks are not padded.

    Raises:
        ValueError: The free memory does not hold a single KV page.
    """
    packed = isinstance(forward, PackedForward)
    # Other routes pass one table to the model for all of its layers.
    groups = group_layers(forward.layers, packed, config.max_sequence_length or context_length)
    resolved = resolve_config(
        config,
        forward.layers,
        context_length,
        forward.device,
        free_bytes,
        forward.weight_bytes,
        forward.state_bytes,
        groups,
        snapshots=packed,
    )
    # A packed row can continue from any of its tokens. A row with a recurrent state cannot.
    drafted = MAX_DRAFTED if packed and not forward.state_bytes else 0
    padding = NO_PADDING
    if packed and padded:
        samples = resolved.max_rows + drafted
        active = forward.weight_bytes - idle_bytes(forward.view)
        padding = largest_padding(resolved.max_batch_tokens, resolved.max_rows, samples, active)
    max_writes = HISTORY_START + MAX_PADDING + resolved.max_sequence_length
    return EngineSizes(resolved, groups, drafted, padding, max_writes)
