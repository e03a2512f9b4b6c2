"""Which tokens one program of a scan takes: all of a row's tokens in the step, one after another."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.attention.base import AttentionContext, DecodeContext, MixedContext

# Numbers of tiles that share a kernel, so that few kernels are compiled.
_FEW_TILES = 256


class ChunkSetting(NamedTuple):
    """How a scan goes through prompts in chunks.

    Attributes:
        chunk: Tokens of a chunk: 16, 32 or 64.
        columns: Columns of the state that a program holds.
        warps: Warps of a program.
        stages: Chunks whose inputs are on their way at a time.
    """

    chunk: int
    columns: int
    warps: int
    stages: int


def tiles_of(context: AttentionContext) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """Rows, first tokens and lengths of the tiles, their number, and a power of two that covers it.

    In a step in which every row decodes, the tensors only fill places.
    """
    if isinstance(context, DecodeContext):
        return context.rows, context.rows, context.rows, context.rows.shape[0], 1
    count = context.tile_rows.shape[0]
    tiles = context.tile_rows, context.tile_queries, context.tile_lengths
    return *tiles, count, triton.next_power_of_2(max(count, _FEW_TILES))


def in_chunks(context: AttentionContext, *inputs: torch.Tensor) -> bool:
    """Whether a step's prompts are computed in chunks: where tensor cores multiply the inputs as they are.

    Products of float32 on tensor cores would round them, so prompts in float32 are computed token by token.
    """
    return isinstance(context, MixedContext) and all(
        one.dtype is torch.bfloat16 and multiplies_bfloat16(one.device) for one in inputs
    )


@functools.cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has tensor cores for bfloat16."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
