"""The Triton kernels behind the interface of an attention backend."""

from __future__ import annotations

import torch

from hf_async_batching.attention.backend import AttentionOptions
from hf_async_batching.attention.context import AttentionContext
from hf_async_batching.attention.triton_kernels import PREFILL_TILE, decode_attention, prefill_attention, write_kv


class TritonBackend:
    """Reads every length and page on the device, so that a captured graph stays right as sequences grow."""

    tile_size = PREFILL_TILE
    reads_back = False

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        context: AttentionContext,
        options: AttentionOptions,
    ) -> torch.Tensor:
        assert context.cache is not None
        keys, values = context.cache.keys[layer], context.cache.values[layer]
        write_kv(key, value, keys, values, context.page_table, context.rows, context.positions)
        if context.decode:
            assert context.context_lengths is not None
            return decode_attention(
                query,
                keys,
                values,
                context.page_table,
                context.rows,
                context.context_lengths,
                scaling=options.scaling,
                sliding_window=options.sliding_window,
                softcap=options.softcap,
            )
        assert context.tile_rows is not None and context.tile_queries is not None
        assert context.tile_lengths is not None and context.tile_positions is not None
        return prefill_attention(
            query,
            keys,
            values,
            context.page_table,
            context.tile_rows,
            context.tile_queries,
            context.tile_lengths,
            context.tile_positions,
            scaling=options.scaling,
            sliding_window=options.sliding_window,
            softcap=options.softcap,
        )
