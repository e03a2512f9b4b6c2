"""Which tokens one program of a scan takes: all of a row's tokens in the step, one after another."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.attention.base import AttentionContext, DecodeContext

# Numbers of tiles that share a kernel, so that few kernels are compiled.
_FEW_TILES = 256


def tiles_of(context: AttentionContext) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """Rows, first tokens and lengths of the tiles, their number, and a power of two that covers it.

    In a step in which every row decodes, the tensors only fill places.
    """
    if isinstance(context, DecodeContext):
        return context.rows, context.rows, context.rows, context.rows.shape[0], 1
    count = context.tile_rows.shape[0]
    tiles = context.tile_rows, context.tile_queries, context.tile_lengths
    return *tiles, count, triton.next_power_of_2(max(count, _FEW_TILES))
