"""What the attention function needs to know about a step, beside queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hf_async_batching.attention.base import AttentionBackend
    from hf_async_batching.kv_cache.paged_cache import PagedCache


@dataclass(slots=True)
class AttentionContext:
    """Rows, positions and pages of the packed query tokens of one step.

    In a decode step every query token belongs to another row; in a mixed step the queries are described by tiles:
    runs of consecutive tokens of one row. The rows that decode come first there, one token and one tile each.

    Attributes:
        page_table: int32 [rows, max_pages_per_row]; [groups, rows, max_pages_per_row] where the cache has groups of
            layers.
        rows: int32 [tokens], row of each query token.
        positions: int32 [tokens], position of each query token in its row.
        decode: Whether this is a decode step.
        context_lengths: int32 [tokens], keys visible to each query, itself included; in a mixed step for its first
            `num_decodes` tokens only.
        num_decodes: How many of a mixed step's first tokens, and tiles, are rows that decode.
        tile_rows: int32 [tiles] (mixed steps).
        tile_queries: int32 [tiles], index of the tile's first query token.
        tile_lengths: int32 [tiles], query tokens in the tile.
        tile_positions: int32 [tiles], position of the tile's first query token.
        cache: Keys and values; set by the runner.
        backend: The kernels; set by the runner.
        host_lists: A scratch place where a backend keeps what it read back from the tensors, once per step.
    """

    page_table: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    decode: bool
    context_lengths: torch.Tensor | None = None
    num_decodes: int = 0
    tile_rows: torch.Tensor | None = None
    tile_queries: torch.Tensor | None = None
    tile_lengths: torch.Tensor | None = None
    tile_positions: torch.Tensor | None = None
    cache: PagedCache | None = None
    backend: AttentionBackend | None = None
    host_lists: dict[str, object] = field(default_factory=dict)

    def table_of(self, layer: int) -> torch.Tensor:
        """int32 [rows, max_pages_per_row], the page table of a layer."""
        assert self.cache is not None
        if self.cache.group_of is None:
            return self.page_table
        tables = self.host_lists.get("tables")
        if not isinstance(tables, tuple):
            tables = self.host_lists["tables"] = self.page_table.unbind(0)
        table: torch.Tensor = tables[self.cache.group_of[layer]]
        return table
