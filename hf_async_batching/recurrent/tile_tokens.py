# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Device side of `triton_tiles`."""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]


@triton.jit
def tokens_of_program(rows, tile_rows, tile_queries, tile_lengths, tiles, DECODES: tl.constexpr, TILES: tl.constexpr):
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
        row, first, length = tokens_of_tile(tile, tile_rows, tile_queries, tile_lengths, tiles, TILES)
    return row, first, length


@triton.jit
def _counts_of_row(row, tile_rows, tile_lengths, tiles, TILES: tl.constexpr):
    """For each tile, whether it is one of a row, and its number of tokens; and the row's number of tokens."""
    all_tiles = tl.arange(0, TILES)
    owner = tl.load(tile_rows + all_tiles, mask=all_tiles < tiles, other=-1)
    counts = tl.load(tile_lengths + all_tiles, mask=all_tiles < tiles, other=0)
    mine = owner == row
    return mine, counts, tl.sum(tl.where(mine, counts, 0), 0)


@triton.jit
def tokens_of_tile(tile, tile_rows, tile_queries, tile_lengths, tiles, TILES: tl.constexpr):
    """Row of a tile, its first token, and the number of its row's tokens; 0 if an earlier tile stands for the row."""
    row = tl.load(tile_rows + tile)
    first = tl.load(tile_queries + tile)
    mine, _, length = _counts_of_row(row, tile_rows, tile_lengths, tiles, TILES)
    earlier = tl.sum(tl.where(mine & (tl.arange(0, TILES) < tile), 1, 0), 0)
    length = tl.where((row > 0) & (earlier == 0), length, 0)
    return row, first, length


@triton.jit
def tile_in_row(tile, tile_rows, tile_queries, tile_lengths, tiles, TILES: tl.constexpr):
    """First token of a tile's row, and where the tile begins and ends among the row's tokens, and their number."""
    row = tl.load(tile_rows + tile)
    mine, counts, length = _counts_of_row(row, tile_rows, tile_lengths, tiles, TILES)
    begin = tl.sum(tl.where(mine & (tl.arange(0, TILES) < tile), counts, 0), 0)
    end = begin + tl.where(row > 0, tl.load(tile_lengths + tile), 0)
    return tl.load(tile_queries + tile) - begin, begin, end, length
