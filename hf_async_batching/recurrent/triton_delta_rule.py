"""Triton kernels for the gated delta rule over packed tokens; the reference is `reference.delta_rule`.

A program holds some value columns of one head's state of one row in registers, and goes through the row's tokens. The
state is read once and written once a step. Prompts in bfloat16 with one decay per head are computed in chunks of
tokens, by matrix products; rows that decode beside them, other prompts and Kimi Delta Attention token by token.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.attention.base import AttentionContext, DecodeContext
from hf_async_batching.attention.triton_prefill import PREFILL_TILE
from hf_async_batching.devices.shared_memory import shared_memory_limit
from hf_async_batching.recurrent.delta_rule_chunks import chunk_matrices_kernel, delta_rule_chunks_kernel
from hf_async_batching.recurrent.delta_rule_kernel import delta_rule_kernel
from hf_async_batching.recurrent.step import RecurrentStep, decoding
from hf_async_batching.recurrent.triton_tiles import ChunkSetting, in_chunks, tiles_of

# Value columns and warps of a program. One warp needs no synchronization from token to token.
_DECODE, _PROMPT = (32, 4), (16, 1)
_CHUNKS = ChunkSetting(chunk=64, columns=32, warps=4, stages=3)
# For cards with less shared memory than this; wide keys need more than any card has.
_FEW_CHUNKS, _FEW_BYTES = ChunkSetting(chunk=32, columns=32, warps=4, stages=2), 160 * 1024
_MATRIX_WARPS = 4


class _Inputs(NamedTuple):
    """Inputs of one layer, whose last dimensions are contiguous, the state, and the result."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    out: torch.Tensor
    table: torch.Tensor

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of tokens and heads of queries, keys and values."""
        return tuple(one.stride(dim) for one in (self.query, self.key, self.value) for dim in (1, 2))

    @property
    def groups(self) -> tuple[int, int, int]:
        """Number of heads, and how many of them share a key and a query."""
        heads = self.value.shape[2]
        return heads, heads // self.key.shape[2], heads // self.query.shape[2]


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
    table = step.tables.table(name, (heads, key.shape[3], value_dim), torch.float32)
    query, key, value = (one if one.stride(3) == 1 else one.contiguous() for one in (query, key, value))
    make = torch.empty if isinstance(context, DecodeContext) else torch.zeros  # no program writes the padding row's
    out = make(1, tokens, heads, value_dim, dtype=query.dtype, device=query.device)
    given = _Inputs(query, key, value, g.contiguous(), beta.contiguous(), out, table)
    keep = not step.frozen
    decodes = decoding(context)
    if decodes == tokens:
        _by_token(context, given, normalize, keep, decodes)
    elif g.dim() == 3 and in_chunks(context, query, key, value):
        if decodes:
            _by_token(context, given, normalize, keep, decodes)
        _by_chunk(context, given, normalize, keep, decodes)
    else:
        _by_token(context, given, normalize, keep, 0)
    return out


def _by_token(context: AttentionContext, given: _Inputs, normalize: bool, keep: bool, decodes: int) -> None:
    """Compute token by token: the first `decodes` tokens, each of another row, or all tiles if it is 0."""
    key_dim, value_dim = given.key.shape[3], given.value.shape[3]
    tile_rows, tile_queries, tile_lengths, tiles, covering = tiles_of(context)
    columns, warps = _DECODE if decodes else _PROMPT
    columns = min(columns, triton.next_power_of_2(value_dim))
    delta_rule_kernel[(decodes or tiles, given.value.shape[2], triton.cdiv(value_dim, columns))](
        *given,
        *(context.rows, context.positions, tile_rows, tile_queries, tile_lengths, tiles),
        *given.strides,
        *(given.table.stride(0), *given.groups, key_dim**-0.5, key_dim, value_dim),
        KEY=triton.next_power_of_2(key_dim),
        COLUMNS=columns,
        TILES=1 if decodes else covering,
        PER_CHANNEL=given.g.dim() == 4,
        NORMALIZE=normalize,
        DECODES=decodes > 0,
        KEEP=keep,
        num_warps=warps,
    )


def _chunks_for(width: int, memory: int) -> ChunkSetting:
    """The chunks for keys of a width on a card with `memory` bytes of shared memory for a program."""
    return _FEW_CHUNKS if width > 128 or memory < _FEW_BYTES else _CHUNKS


def _by_chunk(context: AttentionContext, given: _Inputs, normalize: bool, keep: bool, decodes: int) -> None:
    """Compute the tiles behind the first `decodes` in chunks."""
    query, key, value, g, beta, out, table = given
    tokens, heads, value_dim = value.shape[1:]
    key_dim = key.shape[3]
    width = max(16, triton.next_power_of_2(key_dim))
    tile_rows, tile_queries, tile_lengths, tiles, covering = tiles_of(context)
    chunk, columns, warps, stages = _chunks_for(width, shared_memory_limit(key.device))
    parts = max(1, PREFILL_TILE // chunk)
    columns = max(16, min(columns * 128 // max(width, 128), triton.next_power_of_2(value_dim)))
    matrices = torch.empty(tokens, heads, 4, chunk, dtype=torch.bfloat16, device=key.device)
    factors = torch.empty(4, heads, tokens, dtype=torch.float32, device=key.device)
    places = tile_rows, tile_queries, tile_lengths, tiles, decodes, tokens
    chunk_matrices_kernel[(heads, parts, tiles - decodes)](
        *(query, key, g, beta, matrices, factors),
        *places,
        *given.strides[:4],
        *(*given.groups, key_dim**-0.5, key_dim),
        KEY=width,
        CHUNK=chunk,
        LEVELS=(chunk // 16).bit_length() - 1,
        PARTS=parts,
        TILES=covering,
        NORMALIZE=normalize,
        num_warps=_MATRIX_WARPS,
    )
    delta_rule_chunks_kernel[(triton.cdiv(value_dim, columns), heads, tiles - decodes)](
        *(query, key, value, matrices, factors, out, table, context.positions),
        *places,
        *given.strides,
        *(table.stride(0), *given.groups, key_dim, value_dim),
        KEY=width,
        COLUMNS=columns,
        CHUNK=chunk,
        TILES=covering,
        KEEP=keep,
        STAGES=stages,
        num_warps=warps,
    )
