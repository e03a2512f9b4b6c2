"""Triton kernel for the state-space scan of Mamba-2 over packed tokens; the reference is `reference.mamba2_scan`.

A program holds some channels of one head's state of one row in registers, and goes through the row's tokens. The state
is read once and written once a step.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.attention.base import DecodeContext
from hf_async_batching.recurrent.mamba2_kernel import mamba2_kernel
from hf_async_batching.recurrent.step import RecurrentStep
from hf_async_batching.recurrent.triton_tiles import tiles_of

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
    """The scan; arguments and result are those of `reference.mamba2_scan`, `name` is the state's.

    `limit` bounds the time steps of prompts. transformers bounds none of a token that is decoded alone.
    """
    context = step.context
    tokens, heads, dim = hidden.shape[1:]
    groups, size = B.shape[2:]
    table = step.tables.table(name, (heads, dim, size), torch.float32)
    hidden, B, C = (one if one.stride(3) == 1 else one.contiguous() for one in (hidden, B, C))
    decodes = isinstance(context, DecodeContext)
    num_decodes = tokens if isinstance(context, DecodeContext) else context.num_decodes
    tile_rows, tile_queries, tile_lengths, tiles, covering = tiles_of(context)
    make = torch.empty if decodes else torch.zeros  # no program writes tokens of the padding row
    out = make(1, tokens, heads, dim, dtype=hidden.dtype, device=hidden.device)
    channels, warps = _DECODE if decodes else _PROMPT
    channels = min(channels, triton.next_power_of_2(dim))
    mamba2_kernel[(tiles, heads, triton.cdiv(dim, channels))](
        *(hidden, dt, A, B, C, A if D is None else D, A if dt_bias is None else dt_bias, out, table),
        *(context.rows, context.positions, tile_rows, tile_queries, tile_lengths, tiles),
        *(num_decodes, *limit),
        *(hidden.stride(1), hidden.stride(2), dt.stride(1), dt.stride(2)),
        *(B.stride(1), B.stride(2), C.stride(1), C.stride(2)),
        *(table.stride(0), heads, heads // groups, dim, size),
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
