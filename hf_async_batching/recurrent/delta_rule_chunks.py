# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Device side of the gated delta rule in chunks of a prompt's tokens; `triton_delta_rule` is the typed door to it.

After Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" and "Gated Delta
Networks" (2024). In a chunk with keys K, queries Q, values V, decays D from token to token and sums of log decays G:

    inverse   = (1 + tril(beta K K^T D, -1))^-1 beta
    updates   = inverse (V - exp(G) K S)
    outputs   = exp(G) Q S + tril(Q K^T D) updates
    new state = exp(G_last) S + K^T (exp(G_last - G) updates)

The inverse and tril(Q K^T D) need no state: `chunk_matrices_kernel` computes them for all chunks at once, and
`delta_rule_chunks_kernel` goes through a row's chunks one after another.
"""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.recurrent.chunk_products import decays, halves, halves_times, input_times
from hf_async_batching.recurrent.tile_tokens import tile_in_row, tokens_of_tile


@triton.jit
def unit_lower_inverse(lower, CHUNK: tl.constexpr, LEVELS: tl.constexpr):
    """Inverse of 1 + `lower` [CHUNK, CHUNK], which is strictly lower triangular; CHUNK is 16 * 2**LEVELS.

    Forward substitution inverts the blocks of 16 on the diagonal, all at once. Then neighbours A and D with the block
    B below become one block: the inverse of [[A, 0], [B, D]] has -D^-1 B A^-1 below.
    """
    BLOCKS: tl.constexpr = CHUNK // 16
    block, row, column = tl.arange(0, BLOCKS), tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    same = block[:, None, None, None] == block[None, None, :, None]
    on_diagonal = tl.sum(tl.where(same, tl.reshape(lower, (BLOCKS, 16, BLOCKS, 16)), 0.0), 2)
    transposed = tl.permute(on_diagonal, (0, 2, 1))
    inverse = tl.where(row == column, 1.0, tl.zeros((BLOCKS, 16, 16), tl.float32))
    for i in range(1, 16):
        weights = tl.sum(tl.where(column == i, transposed, 0.0), 2)
        change = tl.sum(weights[:, :, None] * inverse, 1)
        inverse = tl.where(row == i, inverse - change[:, None, :], inverse)
    spread = tl.where(same, inverse[:, :, None, :], tl.zeros((BLOCKS, 16, BLOCKS, 16), tl.float32))
    result = tl.reshape(spread, (CHUNK, CHUNK))
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    for level in tl.static_range(LEVELS):
        below = (i // (32 << level) == j // (32 << level)) & (i // (16 << level) > j // (16 << level))
        high, low = halves(result)
        changed = halves_times(high, low, tl.where(below, lower, 0.0))
        changed_high, changed_low = halves(changed)
        result -= halves_times(changed_high, changed_low, result)
    return result


@triton.jit(
    do_not_specialize=["tiles", "first_tile", "tokens"],
    do_not_specialize_on_alignment=["tile_rows", "tile_queries", "tile_lengths"],
)
def chunk_matrices_kernel(
    query,
    key,
    g,
    beta,
    matrices,
    factors,
    tile_rows,
    tile_queries,
    tile_lengths,
    tiles,
    first_tile,
    tokens,
    query_token,
    query_head,
    key_token,
    key_head,
    heads,
    key_group,
    query_group,
    scale,
    key_dim,
    KEY: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """One program: every `PARTS`-th chunk of one head that begins in a tile.

    Writes, for each token and head, its rows of both matrices as halves, to `matrices` [tokens, heads, 4, CHUNK], and
    to `factors` [4, heads, tokens] what its key is multiplied by before and after the state's update, what its query
    is multiplied by, and the decay of the whole chunk.
    """
    head = tl.program_id(0)
    tile = first_tile + tl.program_id(2)
    first, begin, end, length = tile_in_row(tile, tile_rows, tile_queries, tile_lengths, tiles, TILES)
    begin = (begin + CHUNK - 1) // CHUNK * CHUNK + tl.program_id(1) * CHUNK
    i, channel = tl.arange(0, CHUNK), tl.arange(0, KEY)
    in_key = channel < key_dim
    for start in range(begin, end, CHUNK * PARTS):
        inside = start + i < length
        token = (first + start + i).to(tl.int64)
        mask = inside[:, None] & in_key[None, :]
        keys = key + token[:, None] * key_token + head // key_group * key_head + channel[None, :]
        queries = query + token[:, None] * query_token + head // query_group * query_head + channel[None, :]
        k = tl.load(keys, mask=mask, other=0.0)
        q = tl.load(queries, mask=mask, other=0.0)
        rate = tl.load(beta + token * heads + head, mask=inside, other=0.0).to(tl.float32)
        sums, decay = decays(tl.load(g + token * heads + head, mask=inside, other=0.0).to(tl.float32), inside)
        of_key, of_query = tl.where(inside, 1.0, 0.0), tl.where(inside, scale, 0.0)
        if NORMALIZE:
            wide_k, wide_q = k.to(tl.float32), q.to(tl.float32)
            of_key *= tl.rsqrt(tl.sum(wide_k * wide_k, 1) + 1e-6)
            of_query *= tl.rsqrt(tl.sum(wide_q * wide_q, 1) + 1e-6)
        transposed = tl.trans(k)
        decay *= of_key[None, :]
        system = tl.dot(k, transposed) * decay * (of_key * rate)[:, None]
        system = tl.where(i[:, None] > i[None, :], system, 0.0)
        inverse = unit_lower_inverse(system, CHUNK, LEVELS) * rate[None, :]
        attention = tl.dot(q, transposed) * decay * of_query[:, None]
        place = matrices + (token[:, None] * heads + head) * (4 * CHUNK) + i[None, :]
        high, low = halves(inverse)
        tl.store(place, high, mask=inside[:, None])
        tl.store(place + CHUNK, low, mask=inside[:, None])
        high, low = halves(attention)
        tl.store(place + 2 * CHUNK, high, mask=inside[:, None])
        tl.store(place + 3 * CHUNK, low, mask=inside[:, None])
        total = tl.sum(tl.where(i == CHUNK - 1, sums, 0.0), 0)
        at = factors + head * tokens + token
        tl.store(at, of_key * tl.exp(sums), mask=inside)
        tl.store(at + heads * tokens, of_key * tl.exp(total - sums), mask=inside)
        tl.store(at + 2 * heads * tokens, of_query * tl.exp(sums), mask=inside)
        tl.store(at + 3 * heads * tokens, tl.exp(total + tl.zeros_like(sums)), mask=inside)


@triton.jit(
    do_not_specialize=["tiles", "first_tile", "tokens"],
    do_not_specialize_on_alignment=["positions", "tile_rows", "tile_queries", "tile_lengths"],
)
def delta_rule_chunks_kernel(
    query,
    key,
    value,
    matrices,
    factors,
    out,
    table,
    positions,
    tile_rows,
    tile_queries,
    tile_lengths,
    tiles,
    first_tile,
    tokens,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    row_stride,
    heads,
    key_group,
    query_group,
    key_dim,
    value_dim,
    KEY: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    KEEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: some value columns of one head of one row, through all chunks of the row's tokens."""
    # Programs with tokens come first: those of other tiles of a row end at once.
    head = tl.program_id(1)
    tile = first_tile + tl.program_id(2)
    row, first, length = tokens_of_tile(tile, tile_rows, tile_queries, tile_lengths, tiles, TILES)
    i, channel = tl.arange(0, CHUNK), tl.arange(0, KEY)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_key, in_value = channel < key_dim, column < value_dim
    kept = column < tl.where(length > 0, value_dim, 0)
    place = row.to(tl.int64) * row_stride + head * key_dim * value_dim + channel[:, None] * value_dim + column[None, :]
    position = tl.load(positions + first, mask=length > 0, other=0)
    known = column < tl.where(position > 0, value_dim, 0)
    state = tl.load(table + place, mask=in_key[:, None] & known[None, :], other=0.0)
    queries = query + head // query_group * query_head + channel[None, :]
    keys = key + head // key_group * key_head + channel[None, :]
    values = value + head * value_head + column[None, :]
    for start in tl.range(0, length, CHUNK, num_stages=STAGES):
        inside = start + i < length
        token = (first + start + i).to(tl.int64)
        k = tl.load(keys + token[:, None] * key_token, mask=inside[:, None] & in_key[None, :], other=0.0)
        q = tl.load(queries + token[:, None] * query_token, mask=inside[:, None] & in_key[None, :], other=0.0)
        v = tl.load(values + token[:, None] * value_token, mask=inside[:, None] & in_value[None, :], other=0.0)
        rows_of = matrices + (token[:, None] * heads + head) * (4 * CHUNK) + i[None, :]
        inverse_high = tl.load(rows_of, mask=inside[:, None], other=0.0)
        inverse_low = tl.load(rows_of + CHUNK, mask=inside[:, None], other=0.0)
        attention_high = tl.load(rows_of + 2 * CHUNK, mask=inside[:, None], other=0.0)
        attention_low = tl.load(rows_of + 3 * CHUNK, mask=inside[:, None], other=0.0)
        at = factors + head * tokens + token
        before = tl.load(at, mask=inside, other=0.0)
        after = tl.load(at + heads * tokens, mask=inside, other=0.0)
        of_query = tl.load(at + 2 * heads * tokens, mask=inside, other=0.0)
        total = tl.load(factors + (3 * heads + head) * tokens + first + start)
        high, low = halves(state)
        error = v.to(tl.float32) - before[:, None] * tl.dot(k, high, tl.dot(k, low))
        update = halves_times(inverse_high, inverse_low, error)
        result = of_query[:, None] * tl.dot(q, high, tl.dot(q, low))
        result += halves_times(attention_high, attention_low, update)
        to = out + (token[:, None] * heads + head) * value_dim + column[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=inside[:, None] & in_value[None, :])
        state = state * total + input_times(tl.trans(k), after[:, None] * update)
    if KEEP:
        tl.store(table + place, state, mask=in_key[:, None] & kept[None, :])
