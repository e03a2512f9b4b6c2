# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Device side of the scan of Mamba-2 in chunks of a prompt's tokens; `triton_mamba2` is the typed door to it.

After Dao and Gu, "Transformers are SSMs" (2024). In a chunk with inputs X, time steps t, decays D from token to token
and sums of log decays G:

    outputs   = tril(C B^T D) t X + exp(G) C S
    new state = exp(G_last) S + B^T (exp(G_last - G) t X)
"""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.recurrent.chunk_products import decays, input_times, times_input
from hf_async_batching.recurrent.mamba2_kernel import time_steps
from hf_async_batching.recurrent.tile_tokens import tokens_of_tile


@triton.jit(
    do_not_specialize=["tiles", "first_tile"],
    do_not_specialize_on_alignment=["positions", "tile_rows", "tile_queries", "tile_lengths"],
)
def mamba2_chunks_kernel(
    hidden,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    out,
    table,
    positions,
    tile_rows,
    tile_queries,
    tile_lengths,
    tiles,
    first_tile,
    least,
    most,
    hidden_token,
    hidden_head,
    dt_token,
    dt_head,
    B_token,
    B_group,
    C_token,
    C_group,
    row_stride,
    heads,
    heads_of_group,
    dim,
    size,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    KEEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: some channels of one head of one row, through all chunks of the row's tokens."""
    # Programs with tokens come first: those of other tiles of a row end at once.
    head = tl.program_id(1)
    group = head // heads_of_group
    tile = first_tile + tl.program_id(2)
    row, first, length = tokens_of_tile(tile, tile_rows, tile_queries, tile_lengths, tiles, TILES)
    i, place_in_state = tl.arange(0, CHUNK), tl.arange(0, SIZE)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    in_head, in_state = channel < dim, place_in_state < size
    kept = channel < tl.where(length > 0, dim, 0)
    place = row.to(tl.int64) * row_stride + head * dim * size + channel[None, :] * size + place_in_state[:, None]
    position = tl.load(positions + first, mask=length > 0, other=0)
    known = channel < tl.where(position > 0, dim, 0)
    state = tl.load(table + place, mask=in_state[:, None] & known[None, :], other=0.0)
    rate = tl.load(A + head).to(tl.float32)
    for start in tl.range(0, length, CHUNK, num_stages=STAGES):
        inside = start + i < length
        token = (first + start + i).to(tl.int64)
        xs = hidden + token[:, None] * hidden_token + head * hidden_head + channel[None, :]
        bs = B + token[:, None] * B_token + group * B_group + place_in_state[None, :]
        cs = C + token[:, None] * C_token + group * C_group + place_in_state[None, :]
        x = tl.load(xs, mask=inside[:, None] & in_head[None, :], other=0.0)
        b = tl.load(bs, mask=inside[:, None] & in_state[None, :], other=0.0)
        c = tl.load(cs, mask=inside[:, None] & in_state[None, :], other=0.0)
        time = tl.load(dt + token * dt_token + head * dt_head, mask=inside, other=0.0).to(tl.float32)
        time = time_steps(time, dt, dt_bias, head, HAS_BIAS, SOFTPLUS)
        time = tl.where(inside, tl.minimum(tl.maximum(time, least), most), 0.0)
        sums, decay = decays(time * rate, inside)
        total = tl.sum(tl.where(i == CHUNK - 1, sums, 0.0), 0)
        wide = x.to(tl.float32)
        result = times_input(tl.dot(c, tl.trans(b)) * decay * time[None, :], x)
        result += tl.exp(sums)[:, None] * input_times(c, state)
        if HAS_D:
            result += tl.load(D + head).to(tl.float32) * wide
        to = out + (token[:, None] * heads + head) * dim + channel[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=inside[:, None] & in_head[None, :])
        weights = time * tl.exp(total - sums)
        state = state * tl.exp(total) + input_times(tl.trans(b), weights[:, None] * wide)
    if KEEP:
        tl.store(table + place, state, mask=in_state[:, None] & kept[None, :])
