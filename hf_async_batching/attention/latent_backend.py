"""Layers that keep latents, as the Triton backend serves them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from hf_async_batching.attention.base import AttentionInputs, AttentionOptions, DecodeContext
from hf_async_batching.attention.triton_latents import (
    LatentConfig,
    Latents,
    decode_latents,
    default_latent_config,
    latent_prefill_sizes,
    prefill_latents,
    write_latents,
)
from hf_async_batching.kv_cache.layer_groups import LayerShape


def attend_latents(inputs: AttentionInputs) -> torch.Tensor:
    """Attention of a layer that keeps latents, as `AttentionBackend.attend`.

    Returns:
        [tokens, num_heads, rank].
    """
    context, key, rotary = inputs.context, inputs.key[:, 0], inputs.query_rotary
    assert rotary is not None
    query, cache, table = inputs.query, inputs.keys, inputs.page_table
    options = _arguments(inputs.options)
    if isinstance(context, DecodeContext):
        latents = Latents(query, rotary, cache, table)
        return decode_latents(latents, key, context.rows, context.context_lengths, **options)
    write_latents(key, cache, table, context.rows, context.positions)
    # Zeros, because empty memory may hold NaN, which would spread from tokens outside all tiles to the scratch page.
    out = query.new_zeros(query.shape)
    decodes = context.num_decodes
    prefill_latents(
        Latents(query, rotary, cache, table),
        context.tile_rows[decodes:],
        context.tile_queries[decodes:],
        context.tile_lengths[decodes:],
        context.tile_positions[decodes:],
        out=out,
        **options,
    )
    if decodes:
        # Decoding rows are written twice, so that one kernel also serves mixed steps.
        decode_latents(
            Latents(query[:decodes], rotary[:decodes], cache, table),
            key[:decodes],
            context.rows[:decodes],
            context.decode_lengths,
            out=out[:decodes],
            beside_prefill=context.tile_rows.numel() > decodes,
            **options,
        )
    return out


def ready_latents(
    layer: LayerShape, page_size: int, batches: Iterable[int], device: torch.device
) -> dict[object, Callable[[], None]]:
    """Jobs that compile each kernel as steps will need it, by a key that names the kernel's form.

    Args:
        layer: A layer that keeps latents.
        page_size: Tokens per page.
        batches: Numbers of rows of coming decode steps.
        device: Device of the model.
    """

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    heads, rank = layer.num_heads, layer.value_dim
    cache = zeros(1, page_size, 1, layer.key_dim, dtype=layer.dtype)
    rotary = zeros(2, heads, layer.key_dim - rank, dtype=layer.dtype)
    latents = Latents(zeros(2, heads, rank, dtype=layer.dtype), rotary, cache, zeros(1, 3))
    sinks = zeros(heads, dtype=layer.dtype) if layer.has_sinks else None
    options = _arguments(AttentionOptions(1.0, layer.sliding_window, None, layer.chunk, sinks))
    index, key = zeros(2), cache[0, :2, 0]
    tile = index[:1]

    def decode(config: LatentConfig) -> None:
        decode_latents(latents, key, index, index, config=config, **options)

    jobs: dict[object, Callable[[], None]] = {}
    sizes = latent_prefill_sizes(heads, layer.dtype, device)
    jobs[layer, "prefill"] = lambda: _discard(prefill_latents(latents, *[tile] * 4, config=sizes, **options))
    for batch in batches:
        config = default_latent_config(batch, heads, layer.dtype, device)
        # Compilation depends on whether contexts are split, and then on the power of two of the splits.
        kind = config._replace(splits=1 << (config.splits - 1).bit_length())
        jobs.setdefault((layer, kind), partial(decode, kind))
    jobs[layer, "write"] = lambda: write_latents(key, cache, latents.page_table, index, index)
    return jobs


def _discard(_: Any) -> None:
    pass


def _arguments(options: AttentionOptions) -> dict[str, Any]:
    return {
        "scaling": options.scaling,
        "sliding_window": options.sliding_window,
        "softcap": options.softcap,
        "chunk": options.chunk,
        "sinks": options.sinks,
    }
