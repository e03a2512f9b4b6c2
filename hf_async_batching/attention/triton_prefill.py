# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Device side of paged attention: writing keys and values to their pages, and attention of packed prompts.

The names are explained in `triton_decode`. Packing the heads of one group beside each other in the rows of a matrix
product, so that each key is read once for all of them, follows FlashAttention-2's and Flash-Decoding's treatment of
grouped queries (Dao, 2023).
"""

import torch
import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]
from triton.language.extra.cuda import gdc_launch_dependents  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.attention.triton_decode import BlockSizes, attend_blocks, power_of_two

PREFILL_TILE = 128
"""The most query tokens in one tile of `prefill_attention`; the host plans its tiles by it."""


def prefill_block_sizes(head_dim: int, head_dim_v: int, group: int, dtype: torch.dtype) -> BlockSizes:
    """The block sizes of `prefill_attention`, by rule: what fits the registers and 96 KB of shared memory."""
    rows = power_of_two(PREFILL_TILE * group)
    widest = power_of_two(max(head_dim, head_dim_v))
    if dtype == torch.float32:
        return BlockSizes(min(rows, 32), 32 if widest <= 64 else 16, 8, 1)
    if widest <= 128:
        # Measured on an H200: never more than 12 % behind the best of the candidates, and the best for long contexts.
        return BlockSizes(min(rows, 64), 64, 4, 5)
    return BlockSizes(min(rows, 64), 32, 8, 2)


# Slices of a step's staged inputs begin anywhere: without this each alignment would compile a kernel of its own.
@triton.jit(do_not_specialize=["max_pages"], do_not_specialize_on_alignment=["rows", "positions"])
def write_kv_kernel(
    key,
    value,
    key_cache,
    value_cache,
    page_table,
    rows,
    positions,
    max_pages,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One program copies the keys and values of one token, for BLOCK_H heads."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    row = tl.load(rows + token).to(tl.int64)
    position = tl.load(positions + token)
    page_index = position // PAGE_SIZE
    # A padding row's position grows without end: past its table it must land on the scratch page, not in the pages
    # of the row that follows in memory.
    page = tl.load(page_table + row * max_pages + page_index, mask=page_index < max_pages, other=0).to(tl.int64)
    slots = ((page * PAGE_SIZE + position % PAGE_SIZE) * KV_HEADS + heads)[:, None]

    mask = (heads < KV_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    value_mask = (heads < KV_HEADS)[:, None] & (value_dims < VALUE_DIM)[None, :]
    key_from = key + token * key_stride_token + heads[:, None] * key_stride_head + dims[None, :]
    value_from = value + token * value_stride_token + heads[:, None] * value_stride_head + value_dims[None, :]
    # Both loads come before both stores so that their latencies overlap.
    keys = tl.load(key_from, mask=mask)
    values = tl.load(value_from, mask=value_mask)
    tl.store(key_cache + slots * HEAD_DIM + dims[None, :], keys, mask=mask)
    tl.store(value_cache + slots * VALUE_DIM + value_dims[None, :], values, mask=value_mask)


@triton.jit(
    do_not_specialize=["max_pages"],
    do_not_specialize_on_alignment=["tile_rows", "tile_query_starts", "tile_query_lengths", "tile_first_positions"],
)
def prefill_kernel(
    query,
    key_cache,
    value_cache,
    page_table,
    tile_rows,
    tile_query_starts,
    tile_query_lengths,
    tile_first_positions,
    output,
    max_pages,
    query_stride_token,
    query_stride_head,
    score_scale,
    cap,
    sinks,
    EARLY: tl.constexpr,
    TILE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One program: one tile, one key-value head, BLOCK_M of the tile's (token, head) pairs.

    The heads of a group stand side by side in the rows of the products, against the row's context.
    """
    if EARLY:
        # Few prompts leave most of the device idle. This kernel is launched the ordinary way, after all kernels before
        # it have ended. A kernel that is launched early behind it waits for its end before using or storing results.
        gdc_launch_dependents()
    BLOCKS: tl.constexpr = (TILE * GROUP + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    # Later tiles of a prompt see more context; started first, they don't leave the device half idle at the end.
    tile = tl.num_programs(0) // (KV_HEADS * BLOCKS) - 1 - program // (KV_HEADS * BLOCKS)
    kv_head = program % (KV_HEADS * BLOCKS) // BLOCKS
    block = program % BLOCKS
    query_rows = tl.load(tile_query_lengths + tile) * GROUP
    if block * BLOCK_M >= query_rows:
        return
    start = tl.load(tile_query_starts + tile).to(tl.int64)
    first_position = tl.load(tile_first_positions + tile)
    pages = page_table + tl.load(tile_rows + tile).to(tl.int64) * max_pages
    pairs = block * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = pairs // GROUP
    heads = kv_head * GROUP + pairs % GROUP
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    positions = first_position + tokens
    earliest = first_position + block * BLOCK_M // GROUP
    context = first_position + (tl.minimum(block * BLOCK_M + BLOCK_M, query_rows) - 1) // GROUP + 1

    query_at = query + (start + tokens)[:, None] * query_stride_token + heads[:, None] * query_stride_head
    query_mask = (pairs < query_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(query_at + dims[None, :], mask=query_mask, other=0.0)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        row_maximum = tl.load(sinks + heads).to(tl.float32) * 1.4426950408889634
        row_sum += 1.0
    begin = 0
    visible_from = tl.zeros([BLOCK_M], tl.int32)
    # Blocks that end before the first query are seen whole by all: no masks there, which is most of a long prompt.
    masked_block = (earliest + 1) // BLOCK_N
    if WINDOW > 0:
        begin = tl.maximum(earliest - WINDOW + 1, 0)
        visible_from = positions - WINDOW + 1
        masked_block = begin // BLOCK_N
    if WINDOW < 0:
        begin = earliest // (-WINDOW) * (-WINDOW)
        visible_from = positions // (-WINDOW) * (-WINDOW)
        masked_block = begin // BLOCK_N
    if WINDOW == 0:
        accumulator, row_maximum, row_sum = attend_blocks(
            accumulator, row_maximum, row_sum, queries, key_cache, value_cache, pages, kv_head, 0, masked_block,
            begin, context, visible_from, positions + 1, score_scale, cap, KV_HEADS, HEAD_DIM, VALUE_DIM, PAGE_SIZE,
            BLOCK_N, BLOCK_D, BLOCK_DV, HAS_CAP, False,
        )  # fmt: skip
    accumulator, row_maximum, row_sum = attend_blocks(
        accumulator, row_maximum, row_sum, queries, key_cache, value_cache, pages, kv_head, masked_block,
        tl.cdiv(context, BLOCK_N), begin, context, visible_from, positions + 1, score_scale, cap, KV_HEADS, HEAD_DIM,
        VALUE_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_CAP, True,
    )  # fmt: skip

    result = accumulator / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    result_at = output + ((start + tokens) * (KV_HEADS * GROUP) + heads)[:, None] * VALUE_DIM + value_dims[None, :]
    result_mask = (pairs < query_rows)[:, None] & (value_dims < VALUE_DIM)[None, :]
    tl.store(result_at, result.to(output.dtype.element_ty), mask=result_mask)
