"""Triton kernel for the gated delta rule over packed tokens; the reference is `reference.delta_rule`.

A program holds some value columns of one head's state of one row in registers, and goes through the row's tokens. The
state is read once and written once a step.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
import triton.language as tl

from hf_async_batching.attention.base import DecodeContext
from hf_async_batching.recurrent.step import RecurrentStep
from hf_async_batching.recurrent.triton_tiles import tiles_of, tokens_of_program

# Value columns and warps of a program. One warp needs no synchronization from token to token.
_DECODE, _PROMPT = (32, 4), (8, 1)


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
    _delta_rule_kernel[(tiles, heads, triton.cdiv(value_dim, columns))](
        *(query, key, value, g, beta, out, table),
        *(context.rows, context.positions, tile_rows, tile_queries, tile_lengths, tiles),
        *(query.stride(1), query.stride(2), key.stride(1), key.stride(2), value.stride(1), value.stride(2)),
        *(heads, heads // key_heads, heads // query.shape[2], key_dim**-0.5, key_dim, value_dim),
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


@triton.jit(do_not_specialize=["tiles"])
def _delta_rule_kernel(
    query,
    key,
    value,
    g,
    beta,
    out,
    table,
    rows,
    positions,
    tile_rows,
    tile_queries,
    tile_lengths,
    tiles,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    heads,
    key_group,
    query_group,
    scale,
    key_dim,
    value_dim,
    KEY: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DECODES: tl.constexpr,
    KEEP: tl.constexpr,
):
    row, first, length = tokens_of_program(rows, tile_rows, tile_queries, tile_lengths, tiles, DECODES, TILES)
    head = tl.program_id(1)
    channel = tl.arange(0, KEY)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    in_key, in_value = channel < key_dim, column < value_dim
    # Programs without a token, and rows that begin, have no columns to read.
    kept = column < tl.where(length > 0, value_dim, 0)
    place = (row.to(tl.int64) * heads + head) * key_dim * value_dim + channel[:, None] * value_dim + column[None, :]
    known = column < tl.where((tl.load(positions + first) > 0) & (length > 0), value_dim, 0)
    state = tl.load(table + place, mask=in_key[:, None] & known[None, :], other=0.0)
    for i in range(0, length):
        token = (first + i).to(tl.int64)
        q = tl.load(query + token * query_token + head // query_group * query_head + channel, mask=in_key, other=0.0)
        k = tl.load(key + token * key_token + head // key_group * key_head + channel, mask=in_key, other=0.0)
        v = tl.load(value + token * value_token + head * value_head + column, mask=in_value, other=0.0)
        rate = tl.load(beta + token * heads + head).to(tl.float32)
        q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
        if NORMALIZE:
            q = q * tl.rsqrt(tl.sum(q * q, 0) + 1e-6)
            k = k * tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        if PER_CHANNEL:
            decay = tl.load(g + (token * heads + head) * key_dim + channel, mask=in_key, other=0.0).to(tl.float32)
            state = state * tl.exp(decay)[:, None]
        else:
            state = state * tl.exp(tl.load(g + token * heads + head).to(tl.float32))
        delta = (v - tl.sum(state * k[:, None], 0)) * rate
        state = state + k[:, None] * delta[None, :]
        result = tl.sum(state * (q * scale)[:, None], 0)
        tl.store(
            out + (token * heads + head) * value_dim + column, result.to(out.dtype.element_ty), mask=in_value
        )
    if KEEP:
        tl.store(table + place, state, mask=in_key[:, None] & kept[None, :])
