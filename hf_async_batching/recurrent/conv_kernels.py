# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Device side of convolutions over packed tokens; `triton_conv` is the typed door to it."""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]


@triton.jit
def _earlier(rows, token, row, WIDTH: tl.constexpr):
    """How many of the `WIDTH - 1` tokens before a token belong to its row, without a gap."""
    count = 0
    goes_on = 1
    for j in tl.static_range(1, WIDTH):
        other = tl.load(rows + token - j, mask=token >= j, other=-1)
        goes_on = tl.where(other == row, goes_on, 0)
        count += goes_on
    return count


@triton.jit(do_not_specialize_on_alignment=["rows", "positions"])
def conv_kernel(
    x,
    weight,
    bias,
    table,
    rows,
    positions,
    out,
    channels,
    x_stride,
    weight_stride,
    row_stride,
    kept,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    DECODES: tl.constexpr,
    KEEP: tl.constexpr,
):
    """One program: some channels of one token."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    row = tl.load(rows + token)
    position = tl.load(positions + token)
    newest = tl.load(x + token * x_stride + channel, mask=mask, other=0.0)
    w = weight + channel * weight_stride
    total = newest.to(tl.float32) * tl.load(w + WIDTH - 1, mask=mask, other=0.0).to(tl.float32)
    state = table + row.to(tl.int64) * row_stride + channel * kept
    earlier = 0
    if not DECODES:
        earlier = _earlier(rows, token, row, WIDTH)
    # From the oldest input to the newest, so that a state is read before its place is written.
    for back in tl.static_range(WIDTH - 1, 0, -1):
        if DECODES:
            known = channel < tl.where(position >= back, channels, 0)
            value = tl.load(state + WIDTH - 1 - back, mask=known, other=0.0)
            if KEEP and back < WIDTH - 1:
                tl.store(state + WIDTH - 2 - back, value, mask=mask)
        else:
            inside = channel < tl.where(earlier >= back, channels, 0)
            known = channel < tl.where((position >= back) & (earlier < back), channels, 0)
            value = tl.load(x + (token - back) * x_stride + channel, mask=inside, other=0.0)
            before = tl.load(state + WIDTH - 1 - back + earlier, mask=known, other=0.0)
            value = tl.where(inside, value, before)
        total += value.to(tl.float32) * tl.load(w + WIDTH - 1 - back, mask=mask, other=0.0).to(tl.float32)
    if DECODES and KEEP and WIDTH > 1:
        tl.store(state + WIDTH - 2, newest, mask=mask)
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        # The family rounds between the convolution and the activation.
        total = total.to(out.dtype.element_ty).to(tl.float32)
        total = total / (1 + tl.exp(-total))
    tl.store(out + token * channels + channel, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["tokens"],
    do_not_specialize_on_alignment=["rows", "positions", "tile_rows", "tile_queries", "tile_lengths"],
)
def keep_kernel(
    x,
    table,
    rows,
    positions,
    tile_rows,
    tile_queries,
    tile_lengths,
    tokens,
    channels,
    x_stride,
    row_stride,
    kept,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keep the last inputs of each row; the tile with the row's last token does it."""
    tile = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(tile_rows + tile)
    length = tl.load(tile_lengths + tile)
    last = (tl.load(tile_queries + tile) + length - 1).to(tl.int64)
    after = tl.load(rows + last + 1, mask=last + 1 < tokens, other=-1)
    mine = tl.where((row > 0) & (length > 0) & (after != row), channels, 0)
    last = tl.maximum(last, 0)
    position = tl.load(positions + last)
    earlier = _earlier(rows, last, row, WIDTH)
    state = table + row.to(tl.int64) * row_stride + channel * kept
    for column in tl.static_range(0, WIDTH - 1):
        back = WIDTH - 2 - column
        inside = channel < tl.where(earlier >= back, mine, 0)
        known = channel < tl.where((position >= back) & (earlier < back), mine, 0)
        value = tl.load(x + (last - back) * x_stride + channel, mask=inside, other=0.0)
        before = tl.load(state + WIDTH - 1 - back + earlier, mask=known, other=0.0)
        tl.store(state + column, tl.where(inside, value, before), mask=channel < mine)
