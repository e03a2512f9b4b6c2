# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Device side of the skinny matrix product: few rows of activations against a large weight.

Such a product only streams the weight, so the kernel is built around its loads: each program takes a strip of BLOCK_N
outputs and a share of the inner dimension, and multiplies weight by activations (not the reverse), so that the
weight, not the few rows, fills the wide side of the tensor cores.
"""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]


# One row is a row count like any other: a constant 1 would compile a kernel of its own.
@triton.jit(do_not_specialize=["rows"])
def skinny_linear_kernel(
    x,
    weight,
    bias,
    residual,
    output,
    partial,
    counters,
    rows,
    N,
    K,
    x_stride,
    blocks_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: BLOCK_N outputs of all rows over one share of the inner dimension.

    The last program to finish a strip adds the shares up, in their order, so that the result does not depend on who
    was last; its counter is back at zero for the next launch.
    """
    strip = tl.program_id(0)
    split = tl.program_id(1)
    ns = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    ms = tl.arange(0, BLOCK_M)
    ks = split * blocks_per_split * BLOCK_K + tl.arange(0, BLOCK_K)
    last = tl.minimum((split + 1) * blocks_per_split, tl.cdiv(K, BLOCK_K))
    # Rows beyond the weight read its last one: their outputs are not stored.
    weight_at = weight + tl.minimum(ns, N - 1).to(tl.int64)[:, None] * K + ks[None, :]
    # Rows that are not there are not read: copies of the last one would all come from the same lines of the cache.
    present = (ms < rows)[:, None]
    x_at = x + ms[:, None] * x_stride + ks[None, :]
    if EARLY:
        # Programmatic dependent launch: this program was placed while the kernel before still ran, and must not read
        # what that one writes before it has ended.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    accumulator = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(split * blocks_per_split, last):
        if EVEN_K:
            w = tl.load(weight_at, eviction_policy="evict_first")
            a = tl.load(x_at, mask=present, other=0.0, eviction_policy="evict_last")
        else:
            inside = (block * BLOCK_K + tl.arange(0, BLOCK_K) < K)[None, :]
            w = tl.load(weight_at, mask=inside, other=0.0, eviction_policy="evict_first")
            a = tl.load(x_at, mask=present & inside, other=0.0, eviction_policy="evict_last")
        accumulator = tl.dot(w, tl.trans(a), accumulator)
        weight_at += BLOCK_K
        x_at += BLOCK_K
    accumulator = tl.trans(accumulator)

    at = ms[:, None] * N + ns[None, :]
    mask = present & (ns < N)[None, :]
    if SPLITS > 1:
        size = rows.to(tl.int64) * N
        tl.store(partial + split * size + at, accumulator, mask=mask)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + strip, 1, sem="acq_rel")
        if arrived != SPLITS - 1:
            return
        tl.store(counters + strip, 0)
        accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for share in range(SPLITS):
            accumulator += tl.load(partial + share * size + at, mask=mask, other=0.0, cache_modifier=".cg")
    if HAS_BIAS:
        accumulator += tl.load(bias + ns, mask=ns < N, other=0.0)[None, :].to(tl.float32)
    if HAS_RESIDUAL:
        # Rounded first, as where the sum is a kernel of its own.
        accumulator = accumulator.to(output.dtype.element_ty).to(tl.float32)
        accumulator += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + at, accumulator.to(output.dtype.element_ty), mask=mask)
