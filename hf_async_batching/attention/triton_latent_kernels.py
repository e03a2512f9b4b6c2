# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Device side of attention to latents: all heads of a row share one key-value head, whose values lie in its keys.

A page keeps for each token a latent of RANK numbers and then ROTARY numbers, WIDTH together. A tile of latents is read
once and takes part in both products: as keys and as values. The heads are the rows of the products. FlashMLA
(DeepSeek, 2025) has the same shape of work. The other names are explained in `triton_decode`; BLOCK_R and BLOCK_P are
RANK and ROTARY rounded up to powers of two.
"""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]
from triton.language.extra.cuda import (  # type: ignore[import-untyped,unused-ignore]
    gdc_launch_dependents,
    gdc_wait,
)


@triton.jit
def _attend_latents(
    accumulator,
    row_maximum,
    row_sum,
    query,
    query_rotary,
    cache,
    pages,
    first_block,
    last_block,
    readable_from,
    readable_to,
    visible_from,
    visible_to,
    score_scale,
    cap,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds the blocks first_block .. last_block - 1 of one row's context to a running softmax; see `attend_blocks`."""
    WIDTH: tl.constexpr = RANK + ROTARY
    ranks = tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_P)
    for block in range(first_block, last_block):
        positions = block * BLOCK_N + tl.arange(0, BLOCK_N)
        readable = (positions >= readable_from) & (positions < readable_to)
        latent_mask = (ranks < RANK)[None, :]
        rotary_mask = (dims < ROTARY)[:, None]
        if MASKED:
            # Hidden tokens are not even read: their pages may belong to others by now and hold NaN.
            latent_mask = latent_mask & readable[:, None]
            rotary_mask = rotary_mask & readable[None, :]
        first_page = block * BLOCK_N // PAGE_SIZE
        page = tl.load(pages + first_page)
        for index in tl.static_range(1, BLOCK_N // PAGE_SIZE):
            exists = (first_page + index) * PAGE_SIZE < readable_to
            following = tl.load(pages + first_page + index, mask=exists, other=0)
            page = tl.where(tl.arange(0, BLOCK_N) < index * PAGE_SIZE, page, following)
        slots = tl.arange(0, BLOCK_N) % PAGE_SIZE if BLOCK_N >= PAGE_SIZE else positions % PAGE_SIZE
        at = page.to(tl.int64) * (PAGE_SIZE * WIDTH) + slots * WIDTH
        latent = tl.load(cache + at[:, None] + ranks[None, :], mask=latent_mask, other=0.0)
        scores = tl.dot(query, tl.trans(latent), input_precision="ieee")
        if ROTARY > 0:
            rotary = tl.load(cache + at[None, :] + RANK + dims[:, None], mask=rotary_mask, other=0.0)
            scores = tl.dot(query_rotary, rotary, scores, input_precision="ieee")
        if HAS_CAP:
            scores = cap * (1.0 - 2.0 / (tl.exp2(scores * score_scale) + 1.0))
        if MASKED:
            visible = (positions[None, :] >= visible_from[:, None]) & (positions[None, :] < visible_to[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        scale = 1.0 if HAS_CAP else score_scale
        maximum = tl.maximum(row_maximum, tl.max(scores, 1) * scale)
        # A query that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
        offset = tl.where(maximum == float("-inf"), 0.0, maximum)
        probabilities = tl.exp2(scores * scale - offset[:, None])
        decay = tl.exp2(row_maximum - offset)
        row_sum = row_sum * decay + tl.sum(probabilities, 1)
        accumulator = accumulator * decay[:, None]
        accumulator = tl.dot(probabilities.to(latent.dtype), latent, accumulator, input_precision="ieee")
        row_maximum = maximum
    return accumulator, row_maximum, row_sum


# In a mixed step the rows are a slice of the staged inputs, which begins anywhere.
@triton.jit(
    do_not_specialize=["splits", "blocks_per_split", "max_pages", "beside"],
    do_not_specialize_on_alignment=["rows", "context_lengths"],
)
def latent_decode_kernel(
    query,
    query_rotary,
    new_key,
    cache,
    page_table,
    rows,
    context_lengths,
    output,
    partial_output,
    partial_log_sum,
    max_pages,
    query_stride_entry,
    query_stride_head,
    rotary_stride_entry,
    rotary_stride_head,
    key_stride_entry,
    score_scale,
    cap,
    sinks,
    splits,
    blocks_per_split,
    beside,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program: BLOCK_M heads of one entry of the batch, one split of its context.

    The token of the entry is read from `new_key`, [entries, WIDTH], and the program at the end of the context writes
    it to its page; no program reads that slot. With SPLIT another kernel combines the parts. `beside` is as in
    `triton_decode.decode_kernel`.
    """
    if PDL:  # noqa: SIM102 - known when compiling, the other one is not
        if beside == 0:
            gdc_wait()
    WIDTH: tl.constexpr = RANK + ROTARY
    heads = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head_mask = heads < HEADS
    split = tl.program_id(1)
    entry = tl.program_id(2).to(tl.int64)
    flat_heads = entry * HEADS + heads
    ranks = tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_P)

    # The length of a padding row may have grown past its table, whose end must not be overrun.
    length = tl.load(context_lengths + entry)
    context = tl.minimum(length, max_pages * PAGE_SIZE)
    pages = page_table + tl.load(rows + entry).to(tl.int64) * max_pages
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(context - WINDOW, 0)
    if WINDOW < 0:
        begin = tl.maximum(context - 1, 0) // (-WINDOW) * (-WINDOW)
    cached = tl.maximum(context - 1, 0)
    first_block = begin // BLOCK_N
    last_block = tl.cdiv(cached, BLOCK_N)
    active_splits = 1
    if SPLIT:
        blocks = tl.maximum(last_block - first_block, 0)
        active_splits = tl.maximum(tl.minimum(splits, blocks // blocks_per_split), 1)
        last_block = first_block + blocks * (split + 1) // active_splits
        first_block += blocks * split // active_splits
        if split >= active_splits:
            if PDL:
                gdc_wait()
            # Weight zero in the combination, which does not know how many splits there are.
            nothing = tl.full([BLOCK_M], float("-inf"), tl.float32)
            tl.store(partial_log_sum + flat_heads * splits + split, nothing, mask=head_mask)
            return

    query_at = query + entry * query_stride_entry + heads[:, None] * query_stride_head + ranks[None, :]
    queries = tl.load(query_at, mask=head_mask[:, None] & (ranks < RANK)[None, :], other=0.0)
    rotary_at = query_rotary + entry * rotary_stride_entry + heads[:, None] * rotary_stride_head + dims[None, :]
    rotary_queries = tl.load(rotary_at, mask=head_mask[:, None] & (dims < ROTARY)[None, :], other=0.0)

    takes_new = tl.where(split == active_splits - 1, context, 0) > 0
    key_at = new_key + entry * key_stride_entry
    token_latent = tl.load(key_at + ranks, mask=ranks < tl.where(takes_new, RANK, 0), other=0.0)
    token_rotary = tl.load(key_at + RANK + dims, mask=dims < tl.where(takes_new, ROTARY, 0), other=0.0)
    # One program writes, and none what lies beyond the table.
    writer = tl.where(tl.program_id(0) == 0, context, -1)
    writes = tl.where(takes_new, length, -2) == writer
    page = tl.load(pages + tl.where(writes, cached // PAGE_SIZE, 0)).to(tl.int64)
    slot_at = cache + (page * PAGE_SIZE + cached % PAGE_SIZE) * WIDTH
    tl.store(slot_at + ranks, token_latent, mask=ranks < tl.where(writes, RANK, 0))
    tl.store(slot_at + RANK + dims, token_rotary, mask=dims < tl.where(writes, ROTARY, 0))

    # Before the loop, because queries and sums together exceed the registers.
    score = tl.sum(queries.to(tl.float32) * token_latent.to(tl.float32)[None, :], 1)
    if ROTARY > 0:
        score += tl.sum(rotary_queries.to(tl.float32) * token_rotary.to(tl.float32)[None, :], 1)
    if HAS_CAP:
        score = cap * (1.0 - 2.0 / (tl.exp2(score * score_scale) + 1.0))
    else:
        score = score * score_scale
    score = tl.where(takes_new, score, float("-inf"))

    accumulator = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    row_maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        # Sinks count once: in the first split.
        here = heads < tl.where(split == 0, HEADS, 0)
        row_maximum = tl.load(sinks + heads, mask=here, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        row_sum = tl.where(here, 1.0, 0.0)
    same = tl.zeros([BLOCK_M], tl.int32)
    accumulator, row_maximum, row_sum = _attend_latents(
        accumulator, row_maximum, row_sum, queries, rotary_queries, cache, pages, first_block, last_block, begin,
        cached, same + begin, same + cached, score_scale, cap, RANK, ROTARY, PAGE_SIZE, BLOCK_N, BLOCK_R, BLOCK_P,
        HAS_CAP, True,
    )  # fmt: skip
    maximum = tl.maximum(row_maximum, score)
    offset = tl.where(maximum == float("-inf"), 0.0, maximum)
    decay, weight = tl.exp2(row_maximum - offset), tl.exp2(score - offset)
    row_sum = row_sum * decay + weight
    token_latent = tl.load(key_at + ranks, mask=ranks < tl.where(takes_new, RANK, 0), other=0.0)
    accumulator = accumulator * decay[:, None] + weight[:, None] * token_latent.to(tl.float32)[None, :]
    if PDL:
        if beside != 0:
            gdc_wait()
        gdc_launch_dependents()

    # An empty context gives zeros.
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    result = accumulator / row_sum[:, None]
    result_mask = head_mask[:, None] & (ranks < RANK)[None, :]
    if SPLIT:
        part = flat_heads * splits + split
        tl.store(partial_output + part[:, None] * RANK + ranks[None, :], result, mask=result_mask)
        tl.store(partial_log_sum + part, maximum + tl.log2(row_sum), mask=head_mask)
    else:
        result_at = output + flat_heads[:, None] * RANK + ranks[None, :]
        tl.store(result_at, result.to(output.dtype.element_ty), mask=result_mask)


@triton.jit(do_not_specialize=["splits"])
def latent_combine_kernel(
    partial_output,
    partial_log_sum,
    output,
    splits,
    PDL: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: the weighted sum of the splits of one head of one entry, in their order, for BLOCK_R numbers."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(0).to(tl.int64)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    parts = tl.arange(0, BLOCK_S)
    log_sums = tl.load(partial_log_sum + head * splits + parts, mask=parts < splits, other=float("-inf"))
    maximum = tl.max(log_sums, 0)
    offset = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp2(log_sums - offset), 0)
    # A split that the context is too short for has written only its log-sum.
    mask = (log_sums != float("-inf"))[:, None] & (ranks < RANK)[None, :]
    at = (head * splits + parts)[:, None] * RANK + ranks[None, :]
    values = tl.load(partial_output + at, mask=mask, other=0.0)
    result = tl.sum(values * tl.exp2(log_sums - offset)[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output + head * RANK + ranks, result.to(output.dtype.element_ty), mask=ranks < RANK)


@triton.jit(do_not_specialize=["tokens"])
def head_product_kernel(
    x,
    weight,
    output,
    tokens,
    x_stride_token,
    x_stride_head,
    weight_stride_head,
    weight_stride_inner,
    weight_stride_outer,
    PDL: tl.constexpr,
    HEADS: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: all tokens of one head times BLOCK_N columns of the head's matrix."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(1)
    token = tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, INNER, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        weight_at = weight + head.to(tl.int64) * weight_stride_head + inner[:, None] * weight_stride_inner
        weight_mask = (inner < INNER)[:, None] & (column < OUTER)[None, :]
        w = tl.load(weight_at + column[None, :] * weight_stride_outer, mask=weight_mask, other=0.0)
        x_at = x + token[:, None].to(tl.int64) * x_stride_token + head * x_stride_head + inner[None, :]
        a = tl.load(x_at, mask=(token < tokens)[:, None] & (inner < INNER)[None, :], other=0.0)
        accumulator = tl.dot(a, w, accumulator, input_precision="ieee")
    out_at = output + (token[:, None] * HEADS + head) * OUTER + column[None, :]
    out_mask = (token < tokens)[:, None] & (column < OUTER)[None, :]
    tl.store(out_at, accumulator.to(output.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=["max_pages"], do_not_specialize_on_alignment=["rows", "positions"])
def write_latents_kernel(
    key,
    cache,
    page_table,
    rows,
    positions,
    max_pages,
    key_stride_token,
    WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program copies what pages keep of one token."""
    token = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, BLOCK_W)
    row = tl.load(rows + token).to(tl.int64)
    position = tl.load(positions + token)
    page_index = position // PAGE_SIZE
    # A padding row's position grows without end: past its table it must land on the scratch page.
    page = tl.load(page_table + row * max_pages + page_index, mask=page_index < max_pages, other=0).to(tl.int64)
    kept = tl.load(key + token * key_stride_token + numbers, mask=numbers < WIDTH)
    tl.store(cache + (page * PAGE_SIZE + position % PAGE_SIZE) * WIDTH + numbers, kept, mask=numbers < WIDTH)


@triton.jit(
    do_not_specialize=["max_pages"],
    do_not_specialize_on_alignment=["tile_rows", "tile_query_starts", "tile_query_lengths", "tile_first_positions"],
)
def latent_prefill_kernel(
    query,
    query_rotary,
    cache,
    page_table,
    tile_rows,
    tile_query_starts,
    tile_query_lengths,
    tile_first_positions,
    output,
    max_pages,
    query_stride_token,
    query_stride_head,
    rotary_stride_token,
    rotary_stride_head,
    score_scale,
    cap,
    sinks,
    EARLY: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program: BLOCK_M of a tile's (token, head) pairs against the row's context; see `prefill_kernel`."""
    if EARLY:
        gdc_launch_dependents()
    BLOCKS: tl.constexpr = (TILE * HEADS + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    # Later tiles of a prompt see more context; started first, they don't leave the device half idle at the end.
    tile = tl.num_programs(0) // BLOCKS - 1 - program // BLOCKS
    block = program % BLOCKS
    query_rows = tl.load(tile_query_lengths + tile) * HEADS
    if block * BLOCK_M >= query_rows:
        return
    start = tl.load(tile_query_starts + tile).to(tl.int64)
    first_position = tl.load(tile_first_positions + tile)
    pages = page_table + tl.load(tile_rows + tile).to(tl.int64) * max_pages
    pairs = block * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = pairs // HEADS
    heads = pairs % HEADS
    ranks = tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_P)
    positions = first_position + tokens
    earliest = first_position + block * BLOCK_M // HEADS
    context = first_position + (tl.minimum(block * BLOCK_M + BLOCK_M, query_rows) - 1) // HEADS + 1

    in_tile = (pairs < query_rows)[:, None]
    query_at = query + (start + tokens)[:, None] * query_stride_token + heads[:, None] * query_stride_head
    queries = tl.load(query_at + ranks[None, :], mask=in_tile & (ranks < RANK)[None, :], other=0.0)
    rotary_at = query_rotary + (start + tokens)[:, None] * rotary_stride_token + heads[:, None] * rotary_stride_head
    rotary_queries = tl.load(rotary_at + dims[None, :], mask=in_tile & (dims < ROTARY)[None, :], other=0.0)
    accumulator = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
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
        accumulator, row_maximum, row_sum = _attend_latents(
            accumulator, row_maximum, row_sum, queries, rotary_queries, cache, pages, 0, masked_block, begin, context,
            visible_from, positions + 1, score_scale, cap, RANK, ROTARY, PAGE_SIZE, BLOCK_N, BLOCK_R, BLOCK_P,
            HAS_CAP, False,
        )  # fmt: skip
    accumulator, row_maximum, row_sum = _attend_latents(
        accumulator, row_maximum, row_sum, queries, rotary_queries, cache, pages, masked_block,
        tl.cdiv(context, BLOCK_N), begin, context, visible_from, positions + 1, score_scale, cap, RANK, ROTARY,
        PAGE_SIZE, BLOCK_N, BLOCK_R, BLOCK_P, HAS_CAP, True,
    )  # fmt: skip

    result = accumulator / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    result_at = output + ((start + tokens) * HEADS + heads)[:, None] * RANK + ranks[None, :]
    tl.store(result_at, result.to(output.dtype.element_ty), mask=in_tile & (ranks < RANK)[None, :])
