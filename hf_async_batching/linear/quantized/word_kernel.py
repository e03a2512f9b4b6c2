# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Device side of products with 4-bit integers, eight to a word of 32 bits, in the layouts of GPTQ and AWQ."""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.linear.quantized.tail import finish


@triton.jit
def place_of(column, INTERLEAVED: tl.constexpr):
    """Where a word holds one of its eight numbers; AWQ puts even ones first, then odd ones."""
    if INTERLEAVED:
        place = (column & 1) * 4 + (column >> 1)
    else:
        place = column
    return place


@triton.jit
def float_of(numbers, HALF: tl.constexpr):
    """Small integers plus 1024 (float16) or 128 (bfloat16), by setting the bits: a conversion takes longer."""
    if HALF:
        values = (numbers | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        values = (numbers | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return values


# One row is a row count like any other: a constant 1 would compile a kernel of its own.
@triton.jit(do_not_specialize=["rows"])
def word_kernel(
    x,
    words,
    scale,
    zeros,
    bias,
    residual,
    output,
    partial,
    counters,
    rows,
    N,
    K,
    x_stride,
    zero_words,
    group,
    blocks_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALONG_K: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: BLOCK_N outputs of all rows over one share of the inner dimension.

    ALONG_K: a word holds eight neighbouring inputs of one output (GPTQ: words [K / 8, N]); otherwise eight outputs of
    one input (AWQ: words [K, N / 8]). A block of BLOCK_K inputs lies within one group; BLOCK_N divides N.
    """
    strip = tl.program_id(0)
    split = tl.program_id(1)
    ns = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    ms = tl.arange(0, BLOCK_M)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, K // BLOCK_K)
    k = first * BLOCK_K
    eight = tl.arange(0, 8)
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    if ALONG_K:
        ws = k // 8 + tl.arange(0, BLOCK_K // 8)
        words_at = words + ws.to(tl.int64)[:, None] * N + ns[None, :]
    else:
        ks = k + tl.arange(0, BLOCK_K)
        columns = strip * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        words_at = words + ks.to(tl.int64)[:, None] * (N // 8) + columns[None, :]
    x_at = x + tl.minimum(ms, rows - 1)[:, None] * x_stride + (k + tl.arange(0, BLOCK_K))[None, :]
    shifts = 4 * place_of(ns % 8, not ALONG_K)
    if EARLY:
        # Programmatic dependent launch: what the kernel before writes is not there until it has ended.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    ahead = tl.load(scale + (tl.minimum(k, K - 1) // group).to(tl.int64) * N + ns).to(tl.float32)
    for block in range(first, last):
        which = block * BLOCK_K // group
        factor = ahead
        # The next block's scales are asked for before this block's product, since no dot needs them.
        following = tl.minimum((block + 1) * BLOCK_K, K - 1) // group
        ahead = tl.load(scale + following.to(tl.int64) * N + ns).to(tl.float32)
        zero = (tl.load(zeros + which.to(tl.int64) * zero_words + ns // 8) >> shifts) & 15
        packed = tl.load(words_at, eviction_policy="evict_first")
        a = tl.load(x_at, eviction_policy="evict_last")
        if ALONG_K:
            numbers = (packed[:, None, :] >> (4 * eight)[None, :, None]) & 15
            words_at += (BLOCK_K // 8) * N
        else:
            numbers = (packed[:, :, None] >> (4 * place_of(eight, True))[None, None, :]) & 15
            words_at += BLOCK_K * (N // 8)
        # Both are whole numbers, so that the difference is exact.
        w = float_of(tl.reshape(numbers, [BLOCK_K, BLOCK_N]), HALF) - float_of(zero, HALF)[None, :]
        sums += tl.dot(tl.trans(w), tl.trans(a)) * factor[:, None]
        x_at += BLOCK_K
    finish(tl.trans(sums), ms, ns, rows, N, bias, residual, output, partial, counters, SPLITS, HAS_BIAS, HAS_RESIDUAL)
