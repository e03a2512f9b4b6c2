# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Device side of paged attention: the online softmax over pages, and the decode kernels built on it.

The parameters of a kernel have no Python types (they are pointers, run-time scalars or compile-time constants), so
this file is not checked as typed code. `triton_kernels` is the typed door to it.

Names used here and in `triton_prefill`, all compile-time constants: HEAD_DIM and VALUE_DIM are the real head sizes,
BLOCK_D and BLOCK_DV the same rounded up to powers of two; GROUP is the number of query heads that share a key-value
head; BLOCK_M and BLOCK_N are the query rows and the cached tokens that one matrix product takes; WINDOW is 0 when
there is no sliding window, and minus the size of a chunk where attention is chunked. Scores are kept in base 2 (the
host folds log2(e) into `score_scale` and `cap`), since the hardware has exp2 and not exp.

The online softmax is Milakov and Gimelshein's (2018) as used by FlashAttention (Dao et al., 2022); dividing one query
over many programs along its context is Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023); pages are PagedAttention's
(Kwon et al., 2023). Attention sinks (Xiao et al., 2023; the learned ones of GPT-OSS) are where a softmax begins: with
their score as its maximum and 1 as its sum.
"""

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]
from triton.language.extra.cuda import (  # type: ignore[import-untyped,unused-ignore]
    gdc_launch_dependents,
    gdc_wait,
)


class BlockSizes(NamedTuple):
    """What one program of an attention kernel takes on.

    Attributes:
        m: Query rows: (token, head) pairs of one key-value head.
        n: Cached tokens of one step.
        warps: Warps of a program.
        stages: Steps in flight; page ids take every other one, as in `DecodeConfig`.
        registers: The most that a thread may use, so that more programs fit on a multiprocessor; 0 for no bound.
    """

    m: int
    n: int
    warps: int
    stages: int
    registers: int = 0


class DecodeConfig(NamedTuple):
    """How `decode_attention` divides its work.

    Attributes:
        splits: The most programs that share a context, 1 to MAX_SPLITS.
        n: Cached tokens of a program's step.
        warps: Warps of a program.
        stages: Steps in flight. Page ids take every other stage, so that 4 do what 3 do, and 5 keep two steps' keys
            and values on their way.
        tokens_per_split: A context is divided into fewer parts where these would hold fewer tokens.
        fused: Whether the last program to finish combines the parts; else a second kernel does.
        pdl: Whether the kernel may be set up while the one before it still runs (compute capability 9 and later).
    """

    splits: int
    n: int
    warps: int
    stages: int
    tokens_per_split: int = 128
    fused: bool = True
    pdl: bool = False


def decode_block_sizes(head_dim: int, head_dim_v: int, group: int, dtype: torch.dtype) -> BlockSizes:
    """The block sizes of `decode_attention`, by rule.

    Decoding is bound by memory: small blocks on few warps leave room for many programs on each multiprocessor, and
    the loads in flight of all of them together fill the memory bus. Measured on an H200 for head size 128 in
    bfloat16 (benchmarks/attention_sweep.py): 32 tokens, 2 warps, 5 stages are within 2 % of the best of all cases.
    """
    bytes_per_token = (power_of_two(head_dim) + power_of_two(head_dim_v)) * dtype.itemsize
    if dtype == torch.float32:
        # Full precision has no tensor cores: the products are plain multiply-adds and want more threads.
        return BlockSizes(16, 32 if bytes_per_token <= 1024 else 16, 4, 3)
    m = power_of_two(min(group, 32))
    if bytes_per_token > 512:  # on an H200, with head size 256, 8 rows and 4,096 tokens: 35 against 43 us
        return BlockSizes(m, 16, 2, 5) if m == 16 and bytes_per_token <= 1024 else BlockSizes(m, 32, 4, 3)
    return BlockSizes(m, 32, 2 if m == 16 else 4, 5)


def power_of_two(number: int, at_least: int = 16) -> int:
    """The next power of two; a matrix product takes no side below 16."""
    return max(at_least, 1 << (number - 1).bit_length())


@triton.jit
def attend_blocks(
    accumulator,
    row_maximum,
    row_sum,
    query,
    key_cache,
    value_cache,
    pages,
    kv_head,
    first_block,
    last_block,
    readable_from,
    readable_to,
    visible_from,
    visible_to,
    score_scale,
    cap,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds the blocks first_block .. last_block - 1 of one row's context to a running softmax of BLOCK_M queries.

    `visible_from` and `visible_to` bound what each query may see, `readable_from` and `readable_to` what any may.
    Without MASKED every query sees every token of every block.
    """
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    for block in range(first_block, last_block):
        positions = block * BLOCK_N + tl.arange(0, BLOCK_N)
        readable = (positions >= readable_from) & (positions < readable_to)
        key_mask = (dims < HEAD_DIM)[:, None]
        value_mask = (value_dims < VALUE_DIM)[None, :]
        if MASKED:
            # Hidden tokens are not even read: their pages may belong to others by now and hold NaN, and in the
            # second product 0 * NaN is NaN.
            key_mask = key_mask & readable[None, :]
            value_mask = value_mask & readable[:, None]
        # One load for each page and a select, not one load for each token: the ids are wanted early, and by all lanes.
        first_page = block * BLOCK_N // PAGE_SIZE
        page = tl.load(pages + first_page)
        for index in tl.static_range(1, BLOCK_N // PAGE_SIZE):
            exists = (first_page + index) * PAGE_SIZE < readable_to
            following = tl.load(pages + first_page + index, mask=exists, other=0)
            page = tl.where(tl.arange(0, BLOCK_N) < index * PAGE_SIZE, page, following)
        # Wide arithmetic for the page alone: the rest of a slot's offset is the same in every block of whole pages.
        slots = tl.arange(0, BLOCK_N) % PAGE_SIZE if BLOCK_N >= PAGE_SIZE else positions % PAGE_SIZE
        slots = slots * KV_HEADS + kv_head
        keys_at = page.to(tl.int64) * (PAGE_SIZE * KV_HEADS * HEAD_DIM) + slots * HEAD_DIM
        values_at = page.to(tl.int64) * (PAGE_SIZE * KV_HEADS * VALUE_DIM) + slots * VALUE_DIM

        key = tl.load(key_cache + keys_at[None, :] + dims[:, None], mask=key_mask, other=0.0)
        value = tl.load(value_cache + values_at[:, None] + value_dims[None, :], mask=value_mask, other=0.0)
        scores = tl.dot(query, key, input_precision="ieee")
        if HAS_CAP:
            # tanh(x) by exp2: `score_scale` already holds 2 * log2(e) / softcap. Both ends saturate without NaN.
            scores = cap * (1.0 - 2.0 / (tl.exp2(scores * score_scale) + 1.0))
        if MASKED:
            visible = (positions[None, :] >= visible_from[:, None]) & (positions[None, :] < visible_to[:, None])
            scores = tl.where(visible, scores, float("-inf"))

        # The scale is positive: applied behind the maximum it costs one multiply-add with the subtraction.
        scale = 1.0 if HAS_CAP else score_scale
        maximum = tl.maximum(row_maximum, tl.max(scores, 1) * scale)
        # A query that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
        offset = tl.where(maximum == float("-inf"), 0.0, maximum)
        probabilities = tl.exp2(scores * scale - offset[:, None])
        decay = tl.exp2(row_maximum - offset)
        row_sum = row_sum * decay + tl.sum(probabilities, 1)
        accumulator = accumulator * decay[:, None]
        accumulator = tl.dot(probabilities.to(value.dtype), value, accumulator, input_precision="ieee")
        row_maximum = maximum
    return accumulator, row_maximum, row_sum


@triton.jit
def _combine_splits(
    partial_output,
    partial_log_sum,
    parts,
    active_splits,
    group_mask,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """The weighted sum of the first `active_splits` partial results from `parts` on, always in the same order."""
    value_dims = tl.arange(0, BLOCK_DV)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first_split in range(0, active_splits, 4):
        # Four at a time, so that their loads are on their way together.
        for index in tl.static_range(4):
            split = tl.zeros_like(parts) + first_split + index
            part = parts + split
            mask = group_mask & (split < active_splits)
            # From the L2 cache, which all programs share: another multiprocessor has written them.
            log_sum = tl.load(partial_log_sum + part, mask=mask, other=float("-inf"), cache_modifier=".cg")
            part_mask = mask[:, None] & (value_dims < VALUE_DIM)[None, :]
            part_at = partial_output + part[:, None] * VALUE_DIM + value_dims[None, :]
            values = tl.load(part_at, mask=part_mask, other=0.0, cache_modifier=".cg")
            larger = tl.maximum(maximum, log_sum)
            offset = tl.where(larger == float("-inf"), 0.0, larger)
            decay, weight = tl.exp2(maximum - offset), tl.exp2(log_sum - offset)
            accumulator = accumulator * decay[:, None] + values * weight[:, None]
            total = total * decay + weight
            maximum = larger
    return accumulator / tl.where(total == 0.0, 1.0, total)[:, None]


# In a mixed step the rows are a slice of the staged inputs, which begins anywhere.
@triton.jit(
    do_not_specialize=["max_splits", "blocks_per_split", "max_pages", "beside"],
    do_not_specialize_on_alignment=["rows", "context_lengths"],
)
def decode_kernel(
    query,
    new_key,
    new_value,
    key_cache,
    value_cache,
    page_table,
    rows,
    context_lengths,
    output,
    partial_output,
    partial_log_sum,
    counters,
    max_pages,
    query_stride_entry,
    query_stride_head,
    key_stride_entry,
    key_stride_head,
    value_stride_entry,
    value_stride_head,
    score_scale,
    cap,
    sinks,
    max_splits,
    blocks_per_split,
    beside,
    NEW: tl.constexpr,
    SPLIT: tl.constexpr,
    FUSED: tl.constexpr,
    PDL: tl.constexpr,
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
    """One program: the query heads of one group, one entry of the batch, one split of its context.

    The heads are the fastest grid axis: programs that run side by side then read neighbouring memory. Without SPLIT
    there is one split. With FUSED the last program to finish its split combines them all, and sets the counter by
    which it knew back to 0 for the next launch; without, `combine_kernel` must follow.

    With `beside` the kernel before is `prefill_kernel`, which began when all before it had ended: what this one reads
    is there, and it waits only before it stores its results and lets the next kernel start. Keys and values of the new
    tokens it stores before: they are there already, in rows that no prompt reads.
    """
    if PDL:  # noqa: SIM102 - known when compiling, the other one is not
        if beside == 0:
            gdc_wait()
    GROUP_BLOCKS: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(0) // GROUP_BLOCKS
    group_heads = tl.program_id(0) % GROUP_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    group_mask = group_heads < GROUP
    split = tl.program_id(1)
    entry = tl.program_id(2).to(tl.int64)
    heads = kv_head * GROUP + group_heads
    flat_heads = entry * (KV_HEADS * GROUP) + heads
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)

    # The length of a padding row may have grown past its table, whose end must not be overrun.
    length = tl.load(context_lengths + entry)
    context = tl.minimum(length, max_pages * PAGE_SIZE)
    pages = page_table + tl.load(rows + entry).to(tl.int64) * max_pages
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(context - WINDOW, 0)
    if WINDOW < 0:
        begin = tl.maximum(context - 1, 0) // (-WINDOW) * (-WINDOW)
    cached = context
    if NEW:
        cached = tl.maximum(context - 1, 0)
    # Split here and not on the host: a captured graph must stay right, and balanced, while contexts grow.
    first_block = begin // BLOCK_N
    last_block = tl.cdiv(cached, BLOCK_N)
    active_splits = 1
    if SPLIT:
        blocks = tl.maximum(last_block - first_block, 0)
        active_splits = tl.maximum(tl.minimum(max_splits, blocks // blocks_per_split), 1)
        last_block = first_block + blocks * (split + 1) // active_splits
        first_block += blocks * split // active_splits
        if split >= active_splits:
            if not FUSED:
                if PDL:
                    gdc_wait()
                # Weight zero in the combination, which does not know how many splits there are.
                nothing = tl.full([BLOCK_M], float("-inf"), tl.float32)
                tl.store(partial_log_sum + flat_heads * max_splits + split, nothing, mask=group_mask)
            return

    query_at = query + entry * query_stride_entry + heads[:, None] * query_stride_head + dims[None, :]
    queries = tl.load(query_at, mask=group_mask[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if NEW:
        takes_new = tl.where(split == active_splits - 1, context, 0) > 0
        # Read before the cached ones and used after them, so that no program waits for it.
        key_at = new_key + entry * key_stride_entry + kv_head * key_stride_head
        token_key = tl.load(key_at + dims, mask=dims < tl.where(takes_new, HEAD_DIM, 0), other=0.0)
        value_at = new_value + entry * value_stride_entry + kv_head * value_stride_head
        token_value = tl.load(value_at + value_dims, mask=value_dims < tl.where(takes_new, VALUE_DIM, 0), other=0.0)
        # One program of a group writes, and none what lies beyond the table.
        writer = tl.where(tl.program_id(0) % GROUP_BLOCKS == 0, context, -1)
        writes = tl.where(takes_new, length, -2) == writer
        page = tl.load(pages + tl.where(writes, cached // PAGE_SIZE, 0)).to(tl.int64)
        slot = (page * PAGE_SIZE + cached % PAGE_SIZE) * KV_HEADS + kv_head
        tl.store(key_cache + slot * HEAD_DIM + dims, token_key, mask=dims < tl.where(writes, HEAD_DIM, 0))
        tl.store(
            value_cache + slot * VALUE_DIM + value_dims, token_value,
            mask=value_dims < tl.where(writes, VALUE_DIM, 0),
        )  # fmt: skip
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        # Sinks count once: in the first split.
        here = group_heads < tl.where(split == 0, GROUP, 0)
        row_maximum = tl.load(sinks + heads, mask=here, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        row_sum = tl.where(here, 1.0, 0.0)
    same = tl.zeros([BLOCK_M], tl.int32)
    accumulator, row_maximum, row_sum = attend_blocks(
        accumulator, row_maximum, row_sum, queries, key_cache, value_cache, pages, kv_head, first_block, last_block,
        begin, cached, same + begin, same + cached, score_scale, cap, KV_HEADS, HEAD_DIM, VALUE_DIM, PAGE_SIZE,
        BLOCK_N, BLOCK_D, BLOCK_DV, HAS_CAP, True,
    )  # fmt: skip
    if NEW:
        score = tl.sum(queries.to(tl.float32) * token_key.to(tl.float32)[None, :], 1)
        if HAS_CAP:
            score = cap * (1.0 - 2.0 / (tl.exp2(score * score_scale) + 1.0))
        else:
            score = score * score_scale
        score = tl.where(takes_new, score, float("-inf"))
        maximum = tl.maximum(row_maximum, score)
        offset = tl.where(maximum == float("-inf"), 0.0, maximum)
        decay, weight = tl.exp2(row_maximum - offset), tl.exp2(score - offset)
        row_sum = row_sum * decay + weight
        accumulator = accumulator * decay[:, None] + weight[:, None] * token_value.to(tl.float32)[None, :]
        row_maximum = maximum
    if PDL:
        if beside != 0:
            gdc_wait()
        gdc_launch_dependents()

    # An empty context gives zeros.
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    result = accumulator / row_sum[:, None]
    result_mask = group_mask[:, None] & (value_dims < VALUE_DIM)[None, :]
    result_at = output + flat_heads[:, None] * VALUE_DIM + value_dims[None, :]
    if SPLIT:
        if FUSED and active_splits == 1:
            tl.store(result_at, result.to(output.dtype.element_ty), mask=result_mask)
        else:
            part = flat_heads * max_splits + split
            tl.store(partial_output + part[:, None] * VALUE_DIM + value_dims[None, :], result, mask=result_mask)
            tl.store(partial_log_sum + part, row_maximum + tl.log2(row_sum), mask=group_mask)
            if FUSED:
                counter = counters + entry * (KV_HEADS * GROUP_BLOCKS) + tl.program_id(0)
                # All threads' stores come before the one thread's release, and its acquire before all threads' loads.
                tl.debug_barrier()
                arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
                if arrived == active_splits - 1:
                    result = _combine_splits(
                        partial_output, partial_log_sum, flat_heads * max_splits, active_splits, group_mask,
                        VALUE_DIM, BLOCK_M, BLOCK_DV,
                    )  # fmt: skip
                    tl.store(result_at, result.to(output.dtype.element_ty), mask=result_mask)
                    tl.store(counter, 0)
    else:
        tl.store(result_at, result.to(output.dtype.element_ty), mask=result_mask)


@triton.jit(do_not_specialize=["max_splits"])
def combine_kernel(
    partial_output,
    partial_log_sum,
    output,
    max_splits,
    VALUE_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One program: the weighted sum of the splits of one query head of one entry."""
    head = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, BLOCK_S)
    value_dims = tl.arange(0, BLOCK_DV)
    part = head * max_splits + splits
    log_sums = tl.load(partial_log_sum + part, mask=splits < max_splits, other=float("-inf"))
    # A split that the context is too short for has written only its log-sum.
    mask = (log_sums != float("-inf"))[:, None] & (value_dims < VALUE_DIM)[None, :]
    values = tl.load(partial_output + part[:, None] * VALUE_DIM + value_dims[None, :], mask=mask, other=0.0)
    maximum = tl.max(log_sums, 0)
    weights = tl.exp2(log_sums - tl.where(maximum == float("-inf"), 0.0, maximum))
    total = tl.sum(weights, 0)
    result = tl.sum(values * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output + head * VALUE_DIM + value_dims, result.to(output.dtype.element_ty), mask=value_dims < VALUE_DIM)
