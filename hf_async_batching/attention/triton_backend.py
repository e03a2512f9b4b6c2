"""The Triton kernels behind the interface of an attention backend."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hf_async_batching.attention.backend import AttentionOptions
from hf_async_batching.attention.cache import PagedCache
from hf_async_batching.attention.context import AttentionContext
from hf_async_batching.attention.triton_kernels import PREFILL_TILE, decode_attention, prefill_attention, write_kv
from hf_async_batching.attention.triton_settings import Problem, TritonSettings
from hf_async_batching.tuning import Tuning

# Of decode attention, one for each key-value head of each row; with more of those no context needs splitting.
_COUNTERS = 16384


class TritonBackend:
    """Reads every length and page on the device, so that a captured graph stays right as sequences grow.

    Steps of one backend must not overlap on the device: they share counters. Each engine has a backend of its own.

    Args:
        device: Where the model runs.
        tuning: Settings that were measured; None for the rules'.
    """

    tile_size = PREFILL_TILE
    reads_back = False

    def __init__(self, device: torch.device, tuning: Tuning | None = None) -> None:
        self._settings = TritonSettings(device, tuning)
        # Never replaced, since captured graphs go on using it.
        self._counters = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)

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
            return self._decode(query, layer, context, options, None)
        assert context.tile_rows is not None and context.tile_queries is not None
        assert context.tile_lengths is not None and context.tile_positions is not None
        # Zeros, since the NaN that empty memory may hold would spread from tokens of no tile to the scratch page.
        out = query.new_zeros((*query.shape[:2], values.shape[-1]))
        decodes = context.num_decodes
        if decodes:
            self._decode(query[:decodes], layer, context, options, out[:decodes])
        prefill_attention(
            query,
            keys,
            values,
            context.page_table,
            context.tile_rows[decodes:],
            context.tile_queries[decodes:],
            context.tile_lengths[decodes:],
            context.tile_positions[decodes:],
            scaling=options.scaling,
            sliding_window=options.sliding_window,
            softcap=options.softcap,
            config=self._settings.prefill(Problem.of(query, keys, values, options), layer, options),
            out=out,
        )
        return out

    def _decode(
        self,
        query: torch.Tensor,
        layer: int,
        context: AttentionContext,
        options: AttentionOptions,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        assert context.cache is not None and context.context_lengths is not None
        keys, values = context.cache.keys[layer], context.cache.values[layer]
        return decode_attention(
            query,
            keys,
            values,
            context.page_table,
            context.rows[: query.shape[0]],
            context.context_lengths,
            scaling=options.scaling,
            sliding_window=options.sliding_window,
            softcap=options.softcap,
            config=self._settings.decode(Problem.of(query, keys, values, options), layer, options, query.shape[0]),
            counters=self._counters,
            out=out,
        )

    def tune(self, cache: PagedCache, *, batches: Iterable[int], context: int, prompt: int) -> None:
        self._settings.tune(cache, self._counters, batches=batches, context=context, prompt=prompt)
