"""Which tokens one program of a scan takes: all of a row's tokens in the step, one after another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_async_batching.attention.base import AttentionContext, DecodeContext


def tiles_of(context: AttentionContext) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """Rows, first tokens and lengths of the tiles, their number, and the power of two that covers it.

    In a step in which every row decodes, the tensors only fill places.
    """
    if isinstance(context, DecodeContext):
        return context.rows, context.rows, context.rows, context.rows.shape[0], 1
    count = context.tile_rows.shape[0]
    tiles = context.tile_rows, context.tile_queries, context.tile_lengths
    return *tiles, count, triton.next_power_of_2(max(count, 1))


@triton.jit
def tokens_of_program(
    rows, tile_rows, tile_queries, tile_lengths, tiles, DECODES: tl.constexpr, TILES: tl.constexpr
):
    """Row, first token and number of tokens of a program.

    The program of a row's first tile takes all tiles of the row; programs of its other tiles, of the padding row and
    of tiles without tokens take no token.
    """
    tile = tl.program_id(0)
    if DECODES:
        row = tl.load(rows + tile)
        first = tile
        length = 1
    else:
        row = tl.load(tile_rows + tile)
        first = tl.load(tile_queries + tile)
        all_tiles = tl.arange(0, TILES)
        owner = tl.load(tile_rows + all_tiles, mask=all_tiles < tiles, other=-1)
        counts = tl.load(tile_lengths + all_tiles, mask=all_tiles < tiles, other=0)
        mine = owner == row
        length = tl.sum(tl.where(mine, counts, 0), 0)
        earlier = tl.sum(tl.where(mine & (all_tiles < tile), 1, 0), 0)
        length = tl.where((row > 0) & (earlier == 0), length, 0)
    return row, first, length
