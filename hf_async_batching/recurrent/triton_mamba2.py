"""Triton kernels for the state-space scan of Mamba-2 over packed tokens; the reference is `reference.mamba2_scan`.

A program holds some channels of one head's state of one row in registers, and goes through the row's tokens. The state
is read once and written once a step. Prompts in bfloat16 are computed in chunks of tokens, by matrix products; rows
that decode beside them, and other prompts, token by token.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.attention.base import AttentionContext, DecodeContext
from hf_async_batching.recurrent.mamba2_chunks import mamba2_chunks_kernel
from hf_async_batching.recurrent.mamba2_kernel import mamba2_kernel
from hf_async_batching.recurrent.step import RecurrentStep, decoding
from hf_async_batching.recurrent.triton_tiles import ChunkSetting, in_chunks, tiles_of

# Channels and warps of a program.
_DECODE, _PROMPT = (32, 4), (8, 1)
_CHUNKS = ChunkSetting(chunk=64, columns=32, warps=4, stages=2)


class _Inputs(NamedTuple):
    """Inputs of one layer, whose last dimensions are contiguous, the state, and the result.

    `limit` bounds the time steps of prompts. transformers bounds none of a token that is decoded alone.
    """

    hidden: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    dt_bias: torch.Tensor | None
    out: torch.Tensor
    table: torch.Tensor
    softplus: bool
    limit: tuple[float, float]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The arguments of kernels up to the table; `A` fills the places of those that are absent."""
        return tuple(self.A if one is None else one for one in self[:9])

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of tokens and of heads or groups."""
        return tuple(one.stride(dim) for one in (self.hidden, self.dt, self.B, self.C) for dim in (1, 2))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Number of heads, and of heads in a group; channels of a head, and size of the state."""
        heads, dim = self.hidden.shape[2:]
        groups, size = self.B.shape[2:]
        return heads, heads // groups, dim, size

    @property
    def options(self) -> dict[str, bool]:
        """What kernels are compiled for."""
        return {"HAS_D": self.D is not None, "HAS_BIAS": self.dt_bias is not None, "SOFTPLUS": self.softplus}


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
    """The scan; arguments and result are those of `reference.mamba2_scan`, `name` is the state's."""
    context = step.context
    tokens, heads, dim = hidden.shape[1:]
    table = step.tables.table(name, (heads, dim, B.shape[3]), torch.float32)
    hidden, B, C = (one if one.stride(3) == 1 else one.contiguous() for one in (hidden, B, C))
    make = torch.empty if isinstance(context, DecodeContext) else torch.zeros  # no program writes the padding row's
    out = make(1, tokens, heads, dim, dtype=hidden.dtype, device=hidden.device)
    given = _Inputs(hidden, dt, A, B, C, D, dt_bias, out, table, softplus, limit)
    keep = not step.frozen
    decodes = decoding(context)
    if decodes == tokens:
        _by_token(context, given, keep, decodes)
    elif in_chunks(context, hidden, B, C):
        if decodes:
            _by_token(context, given, keep, decodes)
        _by_chunk(context, given, keep, decodes)
    else:
        _by_token(context, given, keep, 0)
    return out


def _by_token(context: AttentionContext, given: _Inputs, keep: bool, decodes: int) -> None:
    """Compute token by token: the first `decodes` tokens, each of another row, or all tiles if it is 0."""
    heads, _, dim, size = given.sizes
    tile_rows, tile_queries, tile_lengths, tiles, covering = tiles_of(context)
    channels, warps = _DECODE if decodes else _PROMPT
    channels = min(channels, triton.next_power_of_2(dim))
    mamba2_kernel[(decodes or tiles, heads, triton.cdiv(dim, channels))](
        *given.tensors,
        *(context.rows, context.positions, tile_rows, tile_queries, tile_lengths, tiles),
        *(decoding(context), *given.limit),
        *given.strides,
        *(given.table.stride(0), *given.sizes),
        SIZE=triton.next_power_of_2(size),
        CHANNELS=channels,
        TILES=1 if decodes else covering,
        DECODES=decodes > 0,
        KEEP=keep,
        num_warps=warps,
        **given.options,
    )


def _by_chunk(context: AttentionContext, given: _Inputs, keep: bool, decodes: int) -> None:
    """Compute the tiles behind the first `decodes` in chunks."""
    heads, _, dim, size = given.sizes
    width = max(16, triton.next_power_of_2(size))
    tile_rows, tile_queries, tile_lengths, tiles, covering = tiles_of(context)
    chunk, columns, warps, stages = _CHUNKS
    columns = max(16, min(columns, triton.next_power_of_2(dim)))
    mamba2_chunks_kernel[(triton.cdiv(dim, columns), heads, tiles - decodes)](
        *given.tensors,
        *(context.positions, tile_rows, tile_queries, tile_lengths, tiles, decodes),
        *given.limit,
        *given.strides,
        *(given.table.stride(0), *given.sizes),
        SIZE=width,
        CHANNELS=columns,
        CHUNK=chunk,
        TILES=covering,
        KEEP=keep,
        STAGES=stages,
        num_warps=warps,
        **given.options,
    )
