# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Device side of the scan of Mamba-2; `triton_mamba2` is the typed door to it."""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.recurrent.tile_tokens import tokens_of_program


@triton.jit
def _log1p(x):
    """log(1 + x), exact for small x, too; after W. Kahan: the rounding of 1 + x is divided out."""
    sum = 1.0 + x
    return tl.where(sum == 1.0, x, tl.log(sum) * (x / tl.where(sum == 1.0, 1.0, sum - 1.0)))


@triton.jit
def time_steps(time, dt, dt_bias, head, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Time steps of a head from the values in `dt`; every sum is rounded where torch rounds it."""
    if HAS_BIAS:
        time += tl.load(dt_bias + head).to(dt.dtype.element_ty).to(tl.float32)
        time = time.to(dt.dtype.element_ty).to(tl.float32)
    if SOFTPLUS:
        # torch's softplus is the identity above 20, and rounds its result.
        time = tl.where(time > 20.0, time, _log1p(tl.exp(tl.minimum(time, 20.0))))
        time = time.to(dt.dtype.element_ty).to(tl.float32)
    return time


@triton.jit(
    do_not_specialize=["tiles", "num_decodes"],
    do_not_specialize_on_alignment=["rows", "positions", "tile_rows", "tile_queries", "tile_lengths"],
)
def mamba2_kernel(
    hidden,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    out,
    table,
    rows,
    positions,
    tile_rows,
    tile_queries,
    tile_lengths,
    tiles,
    num_decodes,
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
    TILES: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    DECODES: tl.constexpr,
    KEEP: tl.constexpr,
):
    """One program: some channels of one head of one row, through all of the row's tokens."""
    row, first, length = tokens_of_program(rows, tile_rows, tile_queries, tile_lengths, tiles, DECODES, TILES)
    head = tl.program_id(1)
    group = head // heads_of_group
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    place_in_state = tl.arange(0, SIZE)
    in_head, in_state = channel < dim, place_in_state < size
    place = row.to(tl.int64) * row_stride + head * dim * size + channel[:, None] * size + place_in_state[None, :]
    # Programs without a token, and rows that begin, have no channels to read.
    kept = channel < tl.where(length > 0, dim, 0)
    known = channel < tl.where((tl.load(positions + first) > 0) & (length > 0), dim, 0)
    state = tl.load(table + place, mask=known[:, None] & in_state[None, :], other=0.0)
    rate = tl.load(A + head).to(tl.float32)
    skip = 0.0
    if HAS_D:
        skip = tl.load(D + head).to(tl.float32)
    for i in range(0, length):
        token = (first + i).to(tl.int64)
        x = tl.load(hidden + token * hidden_token + head * hidden_head + channel, mask=in_head, other=0.0)
        b = tl.load(B + token * B_token + group * B_group + place_in_state, mask=in_state, other=0.0)
        c = tl.load(C + token * C_token + group * C_group + place_in_state, mask=in_state, other=0.0)
        time = tl.load(dt + token * dt_token + head * dt_head).to(tl.float32)
        time = time_steps(time, dt, dt_bias, head, HAS_BIAS, SOFTPLUS)
        if not DECODES:
            bounded = tl.minimum(tl.maximum(time, least), most)
            time = tl.where(first < num_decodes, time, bounded)
        x, b, c = x.to(tl.float32), b.to(tl.float32), c.to(tl.float32)
        state = state * tl.exp(time * rate) + (time * x)[:, None] * b[None, :]
        result = tl.sum(state * c[None, :], 1) + skip * x
        tl.store(out + (token * heads + head) * dim + channel, result.to(out.dtype.element_ty), mask=in_head)
    if KEEP:
        tl.store(table + place, state, mask=kept[:, None] & in_state[None, :])
