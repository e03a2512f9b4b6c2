# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Device side of products with 8-bit floats that have a scale for each square block.

Activations are quantized, too, as the layer's own forward does it: each row's 128 neighbouring values by their largest
magnitude. Tensor cores multiply the 8-bit floats. Every program quantizes the few rows anew, which costs less than
a launch in front.
"""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.linear.quantized.tail import finish

LARGEST = tl.constexpr(448.0)  # of float8_e4m3fn


# One row is a row count like any other: a constant 1 would compile a kernel of its own.
@triton.jit(do_not_specialize=["rows"])
def fp8_block_kernel(
    x,
    weight,
    scale,
    bias,
    residual,
    output,
    partial,
    counters,
    rows,
    N,
    K,
    x_stride,
    row_blocks,
    blocks_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALE_N: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: BLOCK_N outputs of all rows over one share of the inner dimension.

    BLOCK_K columns and SCALE_N rows share a scale; BLOCK_N divides SCALE_N, and BLOCK_K divides K.
    """
    strip = tl.program_id(0)
    split = tl.program_id(1)
    ns = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    ms = tl.arange(0, BLOCK_M)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, row_blocks)
    ks = first * BLOCK_K + tl.arange(0, BLOCK_K)
    # Rows beyond the weight read its last one: their outputs are not stored.
    weight_at = weight + tl.minimum(ns, N - 1).to(tl.int64)[:, None] * K + ks[None, :]
    x_at = x + tl.minimum(ms, rows - 1)[:, None] * x_stride + ks[None, :]
    scale_at = scale + (strip * BLOCK_N // SCALE_N) * row_blocks
    if EARLY:
        # Programmatic dependent launch: what the kernel before writes is not there until it has ended.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(first, last):
        w = tl.load(weight_at, eviction_policy="evict_first")
        a = tl.load(x_at, eviction_policy="evict_last").to(tl.float32)
        # A row of zeros has no magnitude to divide by.
        step = tl.maximum(tl.max(tl.abs(a), axis=1), 1e-12) / LARGEST
        a = (a / step[:, None]).to(tl.float8e4nv, fp_downcast_rounding="rtne")
        sums += tl.dot(w, tl.trans(a)) * (step * tl.load(scale_at + block))[None, :]
        weight_at += BLOCK_K
        x_at += BLOCK_K
    finish(tl.trans(sums), ms, ns, rows, N, bias, residual, output, partial, counters, SPLITS, HAS_BIAS, HAS_RESIDUAL)
