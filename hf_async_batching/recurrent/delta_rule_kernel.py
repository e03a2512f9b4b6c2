# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Device side of the gated delta rule; `triton_delta_rule` is the typed door to it."""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.recurrent.tile_tokens import tokens_of_program


@triton.jit(
    do_not_specialize=["tiles"],
    do_not_specialize_on_alignment=["rows", "positions", "tile_rows", "tile_queries", "tile_lengths"],
)
def delta_rule_kernel(
    query,
    key,
    value,
    g,
    beta,
    out,
    table,
    rows,
    positions,
    tile_rows,
    tile_queries,
    tile_lengths,
    tiles,
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
    scale,
    key_dim,
    value_dim,
    KEY: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DECODES: tl.constexpr,
    KEEP: tl.constexpr,
):
    """One program: some value columns of one head of one row, through all of the row's tokens."""
    row, first, length = tokens_of_program(rows, tile_rows, tile_queries, tile_lengths, tiles, DECODES, TILES)
    head = tl.program_id(1)
    channel = tl.arange(0, KEY)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    in_key, in_value = channel < key_dim, column < value_dim
    # Programs without a token, and rows that begin, have no columns to read.
    kept = column < tl.where(length > 0, value_dim, 0)
    place = row.to(tl.int64) * row_stride + head * key_dim * value_dim + channel[:, None] * value_dim + column[None, :]
    known = column < tl.where((tl.load(positions + first) > 0) & (length > 0), value_dim, 0)
    state = tl.load(table + place, mask=in_key[:, None] & known[None, :], other=0.0)
    for i in range(0, length):
        token = (first + i).to(tl.int64)
        q = tl.load(query + token * query_token + head // query_group * query_head + channel, mask=in_key, other=0.0)
        k = tl.load(key + token * key_token + head // key_group * key_head + channel, mask=in_key, other=0.0)
        v = tl.load(value + token * value_token + head * value_head + column, mask=in_value, other=0.0)
        rate = tl.load(beta + token * heads + head).to(tl.float32)
        q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
        if NORMALIZE:
            q = q * tl.rsqrt(tl.sum(q * q, 0) + 1e-6)
            k = k * tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        if PER_CHANNEL:
            decay = tl.load(g + (token * heads + head) * key_dim + channel, mask=in_key, other=0.0).to(tl.float32)
            state = state * tl.exp(decay)[:, None]
        else:
            state = state * tl.exp(tl.load(g + token * heads + head).to(tl.float32))
        delta = (v - tl.sum(state * k[:, None], 0)) * rate
        state = state + k[:, None] * delta[None, :]
        result = tl.sum(state * (q * scale)[:, None], 0)
        tl.store(out + (token * heads + head) * value_dim + column, result.to(out.dtype.element_ty), mask=in_value)
    if KEEP:
        tl.store(table + place, state, mask=in_key[:, None] & kept[None, :])
