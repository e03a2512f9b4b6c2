"""Triton kernel for the state-space scan of Mamba-2 over packed tokens; the reference is `reference.mamba2_scan`.

A program holds some channels of one head's state of one row in registers, and goes through the row's tokens. The state
is read once and written once a step.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
import triton.language as tl

from hf_async_batching.attention.base import DecodeContext
from hf_async_batching.recurrent.step import RecurrentStep
from hf_async_batching.recurrent.triton_tiles import tiles_of, tokens_of_program

# Channels and warps of a program.
_DECODE, _PROMPT = (32, 4), (8, 1)


def row_mamba2_scan(
    step: RecurrentStep,
    name: Hashable,
    hidden: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    softplus: bool,
    limit: tuple[float, float],
) -> torch.Tensor:
    """The scan; arguments and result are those of `reference.mamba2_scan`.

    Args:
        step: The step.
        name: Name of the state.
        hidden: [1, tokens, heads, head dim].
        dt: [1, tokens, heads].
        A: [heads].
        B: [1, tokens, groups, state size].
        C: [1, tokens, groups, state size].
        D: [heads], or None.
        dt_bias: [heads], or None.
        softplus: Whether softplus is applied to `dt`.
        limit: Bounds of the time steps of prompts; transformers bounds none of a token that is decoded alone.

    Returns:
        [1, tokens, heads, head dim], in the dtype of `hidden`.
    """
    context = step.context
    tokens, heads, dim = hidden.shape[1:]
    groups, size = B.shape[2:]
    table = step.tables.table(name, (heads, dim, size), torch.float32)
    hidden, B, C = (one if one.stride(3) == 1 else one.contiguous() for one in (hidden, B, C))
    decodes = isinstance(context, DecodeContext)
    tile_rows, tile_queries, tile_lengths, tiles, covering = tiles_of(context)
    make = torch.empty if decodes else torch.zeros  # no program writes tokens of the padding row
    out = make(1, tokens, heads, dim, dtype=hidden.dtype, device=hidden.device)
    channels, warps = _DECODE if decodes else _PROMPT
    channels = min(channels, triton.next_power_of_2(dim))
    _mamba2_kernel[(tiles, heads, triton.cdiv(dim, channels))](
        *(hidden, dt, A, B, C, A if D is None else D, A if dt_bias is None else dt_bias, out, table),
        *(context.rows, context.positions, tile_rows, tile_queries, tile_lengths, tiles),
        *(0 if decodes else context.num_decodes, *limit),
        *(hidden.stride(1), hidden.stride(2), dt.stride(1), dt.stride(2)),
        *(B.stride(1), B.stride(2), C.stride(1), C.stride(2)),
        *(heads, heads // groups, dim, size),
        SIZE=triton.next_power_of_2(size),
        CHANNELS=channels,
        TILES=covering,
        HAS_D=D is not None,
        HAS_BIAS=dt_bias is not None,
        SOFTPLUS=softplus,
        DECODES=decodes,
        KEEP=not step.frozen,
        num_warps=warps,
    )
    return out


@triton.jit
def _log1p(x):
    """log(1 + x), exact for small x, too; after W. Kahan: the rounding of 1 + x is divided out."""
    sum = 1.0 + x
    return tl.where(sum == 1.0, x, tl.log(sum) * (x / tl.where(sum == 1.0, 1.0, sum - 1.0)))


@triton.jit(do_not_specialize=["tiles", "num_decodes"])
def _mamba2_kernel(
    hidden,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    out,
    table,
    rows,
    positions,
    tile_rows,
    tile_queries,
    tile_lengths,
    tiles,
    num_decodes,
    least,
    most,
    hidden_token,
    hidden_head,
    dt_token,
    dt_head,
    B_token,
    B_group,
    C_token,
    C_group,
    heads,
    heads_of_group,
    dim,
    size,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    DECODES: tl.constexpr,
    KEEP: tl.constexpr,
):
    row, first, length = tokens_of_program(rows, tile_rows, tile_queries, tile_lengths, tiles, DECODES, TILES)
    head = tl.program_id(1)
    group = head // heads_of_group
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    place_in_state = tl.arange(0, SIZE)
    in_head, in_state = channel < dim, place_in_state < size
    place = (row.to(tl.int64) * heads + head) * dim * size + channel[:, None] * size + place_in_state[None, :]
    # Programs without a token, and rows that begin, have no channels to read.
    kept = channel < tl.where(length > 0, dim, 0)
    known = channel < tl.where((tl.load(positions + first) > 0) & (length > 0), dim, 0)
    state = tl.load(table + place, mask=known[:, None] & in_state[None, :], other=0.0)
    rate = tl.load(A + head).to(tl.float32)
    skip = 0.0
    if HAS_D:
        skip = tl.load(D + head).to(tl.float32)
    for i in range(0, length):
        token = (first + i).to(tl.int64)
        x = tl.load(hidden + token * hidden_token + head * hidden_head + channel, mask=in_head, other=0.0)
        b = tl.load(B + token * B_token + group * B_group + place_in_state, mask=in_state, other=0.0)
        c = tl.load(C + token * C_token + group * C_group + place_in_state, mask=in_state, other=0.0)
        time = tl.load(dt + token * dt_token + head * dt_head)
        if HAS_BIAS:
            time = (time + tl.load(dt_bias + head).to(dt.dtype.element_ty)).to(dt.dtype.element_ty)
        time = time.to(tl.float32)
        if SOFTPLUS:
            # torch's softplus is the identity above 20, and rounds its result.
            time = tl.where(time > 20.0, time, _log1p(tl.exp(tl.minimum(time, 20.0))))
            time = time.to(dt.dtype.element_ty).to(tl.float32)
        if not DECODES:
            bounded = tl.minimum(tl.maximum(time, least), most)
            time = tl.where(first < num_decodes, time, bounded)
        x, b, c = x.to(tl.float32), b.to(tl.float32), c.to(tl.float32)
        state = state * tl.exp(time * rate) + (time * x)[:, None] * b[None, :]
        result = tl.sum(state * c[None, :], 1) + skip * x
        tl.store(out + (token * heads + head) * dim + channel, result.to(out.dtype.element_ty), mask=in_head)
    if KEEP:
        tl.store(table + place, state, mask=kept[:, None] & in_state[None, :])
