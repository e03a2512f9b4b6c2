"""What attention needs to know of a step, and the interface of attention kernels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from hf_async_batching.kv_cache.layer_groups import LayerShape
from hf_async_batching.kv_cache.paged_cache import PagedCache


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """Options of a layer beyond plain causal attention.

    Attributes:
        scaling: Factor on the products of queries and keys.
        sliding_window: A query at position i sees keys at positions above i - sliding_window; None for all keys.
        softcap: Scores become `softcap * tanh(score / softcap)` before masking; None for no soft cap.
        chunk: A query at position i sees keys from `i - i % chunk` on (chunked attention); None for all keys.
        sinks: [num_heads], a score per head that takes part in the softmax but has no value (attention sinks); None
            for no sinks.
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    chunk: int | None = None
    sinks: torch.Tensor | None = None


@dataclass(slots=True)
class PackedTokens:
    """Rows, positions and pages of the query tokens of one step, packed one after another.

    Attributes:
        page_table: int32 [rows, max_pages_per_row]; [groups, rows, max_pages_per_row] if the cache has groups of
            layers.
        rows: int32 [tokens], the row of each query token.
        positions: int32 [tokens], the position of each query token in its row.
        step_cache: Values that a backend computes once per step from these tensors, by a name of its own.
    """

    page_table: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    step_cache: dict[object, object] = field(default_factory=dict, kw_only=True)

    def table_of(self, group: int) -> torch.Tensor:
        """int32 [rows, max_pages_per_row], the page table of a group of layers."""
        if self.page_table.dim() == 2:
            return self.page_table
        tables = self.step_cache.get("tables")
        if not isinstance(tables, tuple):
            tables = self.step_cache["tables"] = self.page_table.unbind(0)
        table: torch.Tensor = tables[group]
        return table


@dataclass(slots=True)
class DecodeContext(PackedTokens):
    """A step in which every query token belongs to a different row.

    Attributes:
        context_lengths: int32 [tokens], keys visible to each query, itself included.
    """

    context_lengths: torch.Tensor


@dataclass(slots=True)
class MixedContext(PackedTokens):
    """A step with prompts. Tiles describe its queries: a tile is a run of consecutive tokens of one row.

    Decoding rows come first, with one token and one tile each.

    Attributes:
        tile_rows: int32 [tiles], the row of each tile.
        tile_queries: int32 [tiles], index of the tile's first query token.
        tile_lengths: int32 [tiles], query tokens in the tile; a tile of 0 is padding.
        tile_positions: int32 [tiles], position of the tile's first query token.
        decode_lengths: int32 [num_decodes], keys visible to each of the first queries, itself included.
    """

    tile_rows: torch.Tensor
    tile_queries: torch.Tensor
    tile_lengths: torch.Tensor
    tile_positions: torch.Tensor
    decode_lengths: torch.Tensor

    @property
    def num_decodes(self) -> int:
        """Number of leading tokens, and tiles, that are known to be decoding rows."""
        return self.decode_lengths.shape[0]


AttentionContext = DecodeContext | MixedContext


class AttentionInputs(NamedTuple):
    """Inputs of attention in one layer.

    Attributes:
        query: [tokens, num_heads, key_dim].
        key: [tokens, num_kv_heads, key_dim].
        value: [tokens, num_kv_heads, value_dim].
        layer: Index of the layer in the cache.
        context: Rows, positions and pages of the tokens.
        cache: Keys and values of earlier tokens; those of the step's tokens are written to it.
        options: Scaling, window, soft cap, chunk, sinks.
        query_rotary: [tokens, num_heads, key_dim - value_dim] in layers that keep latents, None in others. The queries
            are then [tokens, num_heads, value_dim] and this after them, and the values are the first `value_dim`
            numbers of the keys.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layer: int
    context: AttentionContext
    cache: PagedCache
    options: AttentionOptions
    query_rotary: torch.Tensor | None = None

    @property
    def keys(self) -> torch.Tensor:
        """[pages, page_size, num_kv_heads, key_dim], the layer's keys."""
        return self.cache.keys[self.layer]

    @property
    def values(self) -> torch.Tensor:
        """[pages, page_size, num_kv_heads, value_dim], the layer's values."""
        return self.cache.values[self.layer]

    @property
    def group(self) -> int:
        """The group of layers that the layer belongs to."""
        return 0 if self.cache.group_of is None else self.cache.group_of[self.layer]

    @property
    def page_table(self) -> torch.Tensor:
        """int32 [rows, max_pages_per_row], the page table of the layer's group."""
        return self.context.table_of(self.group)


class AttentionBackend(Protocol):
    """Writes new keys and values into the pages and attends over them.

    Attributes:
        tile_size: The longest run of query tokens of one row that the backend accepts as one tile.
        reads_back: Whether it reads row tables on the host, and so cannot run in a CUDA graph.
    """

    tile_size: int
    reads_back: bool

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """Attention of one layer over the packed tokens of a step.

        Returns:
            [tokens, num_heads, value_dim] in the dtype of the queries.
        """

    def multiply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product of each head with a matrix of its own; see `latents.absorbed_attention`.

        Args:
            x: [tokens, heads, inner].
            weight: [heads, inner, outer], the dtype of `x`.

        Returns:
            [tokens, heads, outer], contiguous.
        """

    def ready(self, layers: Iterable[LayerShape], *, page_size: int, batches: Iterable[int]) -> None:
        """Compile the kernels that steps will launch, in parallel, so that no step waits for compilations in turn.

        Args:
            layers: The model's layers.
            page_size: Tokens per page.
            batches: Numbers of rows of coming decode steps.
        """

    def tune(self, cache: PagedCache, *, batches: Iterable[int], context: int, prompt: int) -> None:
        """Measure settings on the device for the layers that `attend` has been called for, and use the best.

        Measurements that are stored for such a card are not repeated. Graphs that are captured already keep their
        settings. Nothing else may run on the device; the pages are read and never written.

        Args:
            cache: Keys and values.
            batches: Numbers of rows of decode steps to measure; settings are shared up to the next power of two.
            context: Typical number of tokens that a row holds.
            prompt: Typical number of prompt tokens.
        """
