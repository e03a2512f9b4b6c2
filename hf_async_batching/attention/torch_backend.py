"""Paged attention in plain PyTorch: the kernels for CPUs, and the reference for the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.nn import functional

from hf_async_batching.attention.base import AttentionInputs, AttentionOptions, DecodeContext
from hf_async_batching.attention.latents import multiply_by_heads
from hf_async_batching.kv_cache.layer_groups import LayerShape
from hf_async_batching.kv_cache.paged_cache import PagedCache


class _Tile(NamedTuple):
    """A run of query tokens of one row, and the pages of the keys that they may see."""

    first_query: int
    num_queries: int
    first_position: int
    pages: list[int]


class TorchBackend:
    """Calls torch's attention once per row: no work on padding, and every row has its own length."""

    tile_size = 1 << 30
    reads_back = True

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        query, keys, values, options = inputs.query, inputs.keys, inputs.values, inputs.options
        slots = _slots(inputs)
        keys.view(-1, *keys.shape[2:]).index_copy_(0, slots, inputs.key)
        if inputs.query_rotary is None:
            values.view(-1, *values.shape[2:]).index_copy_(0, slots, inputs.value)
        else:  # the values lie within the keys
            query = torch.cat([query, inputs.query_rotary], -1)
        out = query.new_empty(*query.shape[:2], inputs.value.shape[-1])
        for tile in _tiles(inputs):
            end = tile.first_position + tile.num_queries
            begin = 0
            if options.sliding_window is not None:
                begin = max(0, tile.first_position - options.sliding_window + 1)
            if options.chunk is not None:
                begin = max(begin, tile.first_position - tile.first_position % options.chunk)
            queries = query[tile.first_query : tile.first_query + tile.num_queries]
            row_keys = _gather(keys, tile.pages, begin, end)
            row_values = _gather(values, tile.pages, begin, end)
            out[tile.first_query : tile.first_query + tile.num_queries] = _attend_row(
                queries, row_keys, row_values, begin, tile.first_position, options
            )
        return out

    def multiply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return multiply_by_heads(x, weight)

    def ready(self, layers: Iterable[LayerShape], *, page_size: int, batches: Iterable[int]) -> None:
        pass

    def tune(self, cache: PagedCache, *, batches: Iterable[int], context: int, prompt: int) -> None:
        pass


def _slots(inputs: AttentionInputs) -> torch.Tensor:
    """int64 [tokens], the slots of the step's tokens among the slots of all pages."""
    context, name = inputs.context, ("slots", inputs.group)
    slots = context.step_cache.get(name)
    if not isinstance(slots, torch.Tensor):
        page_size, positions = inputs.cache.page_size, context.positions.long()
        pages = inputs.page_table[context.rows, positions // page_size].long()
        slots = context.step_cache[name] = pages * page_size + positions % page_size
    return slots


def _tiles(inputs: AttentionInputs) -> list[_Tile]:
    context, name = inputs.context, ("tiles", inputs.group)
    tiles = context.step_cache.get(name)
    if not isinstance(tiles, list):
        page_size, table = inputs.cache.page_size, inputs.page_table
        if isinstance(context, DecodeContext):
            rows, positions = context.rows.tolist(), context.positions.tolist()
            runs = list(zip(rows, range(len(rows)), [1] * len(rows), positions, strict=True))
        else:
            columns = context.tile_rows, context.tile_queries, context.tile_lengths, context.tile_positions
            runs = list(zip(*(column.tolist() for column in columns), strict=True))
        tiles = context.step_cache[name] = [
            _Tile(first, count, position, table[row, : -(-(position + count) // page_size)].tolist())
            for row, first, count, position in runs
            if count
        ]
    return tiles


def _gather(cache: torch.Tensor, pages: list[int], begin: int, end: int) -> torch.Tensor:
    """Keys or values at positions [begin, end): [end - begin, num_kv_heads, dim]; adjacent pages are not copied."""
    page_size = cache.shape[1]
    first_page = begin // page_size
    pages = pages[first_page:]
    begin -= first_page * page_size
    end -= first_page * page_size
    first, count = pages[0], len(pages)
    if pages[-1] - first == count - 1 and pages == list(range(first, first + count)):
        flat = cache.view(-1, *cache.shape[2:])
        return flat[first * page_size + begin : first * page_size + end]
    gathered = cache[torch.tensor(pages, device=cache.device)]
    return gathered.view(-1, *cache.shape[2:])[begin:end]


def _attend_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, begin: int, position: int, options: AttentionOptions
) -> torch.Tensor:
    """Attention of consecutive queries of one row, starting at `position`, over its keys from position `begin` on.

    Shapes: query [L, H, D], key [S, K, D], value [S, K, Dv]; returns [L, H, Dv].
    """
    num_queries, num_heads = query.shape[:2]
    num_keys, num_kv_heads = key.shape[:2]
    q, k, v = query.transpose(0, 1)[None], key.transpose(0, 1)[None], value.transpose(0, 1)[None]
    mask = None
    by_hand = options.softcap is not None or options.sinks is not None
    plain_causal = begin == position and options.sliding_window is None and options.chunk is None
    if num_queries > 1 and (not plain_causal or by_hand):
        queries = torch.arange(position, position + num_queries, device=query.device)[:, None]
        keys = torch.arange(begin, begin + num_keys, device=query.device)
        mask = keys <= queries
        if options.sliding_window is not None:
            mask &= keys > queries - options.sliding_window
        if options.chunk is not None:
            mask &= keys >= queries - queries % options.chunk
    if by_hand:
        return _by_hand(q, k, v, mask, options)
    if num_queries == 1:
        # The heads of a group share their keys. As queries of one head they need neither a copy nor a mask.
        q = q.reshape(1, num_kv_heads, num_heads // num_kv_heads, -1)
        out = functional.scaled_dot_product_attention(q, k, v, scale=options.scaling)
        return out.reshape(1, num_heads, -1)
    out = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=options.scaling,
        enable_gqa=num_heads != num_kv_heads,
    )
    return out[0].transpose(0, 1)


def _by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, options: AttentionOptions
) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.matmul(q, k.transpose(2, 3)) * options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights[..., : v.shape[2]], v)[0].transpose(0, 1)
