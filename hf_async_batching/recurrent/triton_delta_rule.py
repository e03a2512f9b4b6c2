"""Triton kernel for the gated delta rule over packed tokens; the reference is `reference.delta_rule`.

A program holds some value columns of one head's state of one row in registers, and goes through the row's tokens. The
state is read once and written once a step.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.attention.base import DecodeContext
from hf_async_batching.recurrent.delta_rule_kernel import delta_rule_kernel
from hf_async_batching.recurrent.step import RecurrentStep
from hf_async_batching.recurrent.triton_tiles import tiles_of

# Value columns and warps of a program. One warp needs no synchronization from token to token.
_DECODE, _PROMPT = (32, 4), (16, 1)


def row_delta_rule(
    step: RecurrentStep,
    name: Hashable,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    normalize: bool,
) -> torch.Tensor:
    """The gated delta rule; arguments and result are those of `reference.delta_rule`, `name` is the state's."""
    context = step.context
    tokens, heads, value_dim = value.shape[1:]
    key_heads, key_dim = key.shape[2:]
    table = step.tables.table(name, (heads, key_dim, value_dim), torch.float32)
    query, key, value = (one if one.stride(3) == 1 else one.contiguous() for one in (query, key, value))
    g, beta = g.contiguous(), beta.contiguous()
    decodes = isinstance(context, DecodeContext)
    tile_rows, tile_queries, tile_lengths, tiles, covering = tiles_of(context)
    make = torch.empty if decodes else torch.zeros  # no program writes tokens of the padding row
    out = make(1, tokens, heads, value_dim, dtype=query.dtype, device=query.device)
    columns, warps = _DECODE if decodes else _PROMPT
    columns = min(columns, triton.next_power_of_2(value_dim))
    delta_rule_kernel[(tiles, heads, triton.cdiv(value_dim, columns))](
        *(query, key, value, g, beta, out, table),
        *(context.rows, context.positions, tile_rows, tile_queries, tile_lengths, tiles),
        *(query.stride(1), query.stride(2), key.stride(1), key.stride(2), value.stride(1), value.stride(2)),
        *(table.stride(0), heads, heads // key_heads, heads // query.shape[2], key_dim**-0.5, key_dim, value_dim),
        KEY=triton.next_power_of_2(key_dim),
        COLUMNS=columns,
        TILES=covering,
        PER_CHANNEL=g.dim() == 4,
        NORMALIZE=normalize,
        DECODES=decodes,
        KEEP=not step.frozen,
        num_warps=warps,
    )
    return out
