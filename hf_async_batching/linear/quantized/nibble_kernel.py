# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Device side of products with weights of 4 bits, two neighbouring columns to a byte.

The halves of a byte stay apart: one tile holds the columns of the high halves, another those of the low halves, and
the activations are split in the same way. Nothing is interleaved, and the sum over columns is the same.
"""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.linear.quantized.tail import finish


@triton.jit
def values_of(pairs, table, ASSEMBLY: tl.constexpr, DTYPE: tl.constexpr):
    """The values of the high and of the low halves of bytes.

    Args:
        pairs: uint8, any shape.
        table: float32 [16]; read if there is no assembly.
        ASSEMBLY: PTX of `tables.permute_assembly`, or "".
        DTYPE: bfloat16 or float16.
    """
    if ASSEMBLY == "":
        high = tl.load(table + (pairs >> 4).to(tl.int32)).to(DTYPE)
        low = tl.load(table + (pairs & 15).to(tl.int32)).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        high, low = tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r", [pairs], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        high, low = tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    return high, low


@triton.jit
def scale_at(scale, scale_table, scale_scale, shift, at, mask, NESTED: tl.constexpr):
    """Scales of groups, float32; `at` and `mask` have any shape.

    If they are quantized themselves (`NESTED`), `scale` is uint8, `scale_table` float32 [256], `scale_scale` float32
    with one value for 256 scales, and `shift` a float that is added.
    """
    found = tl.load(scale + at, mask=mask, other=0)
    if NESTED:
        outer = tl.load(scale_scale + at // 256, mask=mask, other=0.0)
        found = tl.load(scale_table + found.to(tl.int32)) * outer + shift
    return found.to(tl.float32)


@triton.jit
def even_and_odd(x, SIZE: tl.constexpr):
    """Split [rows, 2 * SIZE] into its even and its odd columns, [rows, SIZE] each."""
    return tl.split(tl.reshape(x, [x.shape[0], SIZE, 2]))


# One row is a row count like any other: a constant 1 would compile a kernel of its own.
@triton.jit(do_not_specialize=["rows"])
def nibble_dot_kernel(
    x,
    weight,
    table,
    scale,
    scale_table,
    scale_scale,
    scale_shift,
    bias,
    residual,
    output,
    partial,
    counters,
    rows,
    N,
    K,
    x_stride,
    row_bytes,
    row_groups,
    blocks_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    SCALE_ROUNDED: tl.constexpr,
    EVEN_K: tl.constexpr,
    HIGH_FIRST: tl.constexpr,
    NESTED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: BLOCK_N outputs of all rows over one share of the inner dimension, by tensor cores.

    SCALE_FIRST multiplies weights by their scales, in float32 or (SCALE_ROUNDED) in the dtype of `x`. Otherwise a
    block lies within one group, and its sums are multiplied.
    """
    strip = tl.program_id(0)
    split = tl.program_id(1)
    HALF: tl.constexpr = BLOCK_K // 2
    GROUPS: tl.constexpr = BLOCK_K // GROUP if SCALE_FIRST else 1
    ns = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    ms = tl.arange(0, BLOCK_M)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(K, BLOCK_K))
    # Rows beyond the weight read its last one: their outputs are not stored.
    row = tl.minimum(ns, N - 1).to(tl.int64)
    weight_at = weight + row[:, None] * row_bytes + (first * HALF + tl.arange(0, HALF))[None, :]
    present = (ms < rows)[:, None]
    x_at = x + ms[:, None] * x_stride + (first * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    if NESTED:
        shift = tl.load(scale_shift).to(tl.float32)
    else:
        shift = 0.0
    gs = tl.arange(0, GROUPS)
    scales_row = row[:, None] * row_groups
    if EARLY:
        # Programmatic dependent launch: what the kernel before writes is not there until it has ended.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    ahead = scale_at(
        scale, scale_table, scale_scale, shift, scales_row + first * BLOCK_K // GROUP + gs[None, :],
        (first * BLOCK_K + gs * GROUP < K)[None, :], NESTED
    )  # fmt: skip
    for block in range(first, last):
        if EVEN_K:
            pairs = tl.load(weight_at, eviction_policy="evict_first")
            a = tl.load(x_at, mask=present, other=0.0, eviction_policy="evict_last")
        else:
            # Masks that say no more than whole vectors of loads can follow.
            inside = (block * HALF + tl.arange(0, HALF) < row_bytes)[None, :]
            pairs = tl.load(weight_at, mask=inside, other=0, eviction_policy="evict_first")
            inside = (block * BLOCK_K + tl.arange(0, BLOCK_K) < K)[None, :]
            a = tl.load(x_at, mask=present & inside, other=0.0, eviction_policy="evict_last")
        even, odd = even_and_odd(a, HALF)
        high, low = values_of(pairs, table, ASSEMBLY, x.dtype.element_ty)
        if HIGH_FIRST:
            one, two = high, low
        else:
            one, two = low, high
        if SCALE_FIRST:
            at = scales_row + block * BLOCK_K // GROUP + gs[None, :]
            mask = (block * BLOCK_K + gs * GROUP < K)[None, :]
            factor = scale_at(scale, scale_table, scale_scale, shift, at, mask, NESTED)
            factor = tl.broadcast_to(factor[:, :, None], [BLOCK_N, GROUPS, HALF // GROUPS])
            factor = tl.reshape(factor, [BLOCK_N, HALF])
            if SCALE_ROUNDED:
                one, two = one * factor.to(x.dtype.element_ty), two * factor.to(x.dtype.element_ty)
            else:
                one = (one.to(tl.float32) * factor).to(x.dtype.element_ty)
                two = (two.to(tl.float32) * factor).to(x.dtype.element_ty)
            sums = tl.dot(one, tl.trans(even), sums)
            sums = tl.dot(two, tl.trans(odd), sums)
        else:
            factor = ahead
            # The next block's scales are asked for before this block's products, since no dot needs them.
            k = (block + 1) * BLOCK_K
            ahead = scale_at(
                scale, scale_table, scale_scale, shift, scales_row + k // GROUP + gs[None, :],
                (k + gs * GROUP < K)[None, :], NESTED
            )  # fmt: skip
            product = tl.dot(one, tl.trans(even))
            product = tl.dot(two, tl.trans(odd), product)
            sums += product * factor
        weight_at += HALF
        x_at += BLOCK_K
    finish(tl.trans(sums), ms, ns, rows, N, bias, residual, output, partial, counters, SPLITS, HAS_BIAS, HAS_RESIDUAL)


@triton.jit
def row_halves(x, x_stride, row, rows, k, K, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """The even and the odd columns of a row from column k on, float32 [1, GROUPS, WIDTH] each."""
    ks = k + tl.arange(0, 2 * GROUPS * WIDTH)
    values = tl.load(x + tl.minimum(row, rows - 1) * x_stride + ks, mask=ks < K, other=0.0)
    even, odd = tl.split(tl.reshape(values.to(tl.float32), [GROUPS, WIDTH, 2]))
    return even[None, :, :], odd[None, :, :]


@triton.jit(do_not_specialize=["rows"])
def nibble_vector_kernel(
    x,
    weight,
    table,
    scale,
    scale_table,
    scale_scale,
    scale_shift,
    bias,
    residual,
    output,
    partial,
    counters,
    rows,
    N,
    K,
    x_stride,
    row_bytes,
    row_groups,
    blocks_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    HIGH_FIRST: tl.constexpr,
    NESTED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: BLOCK_N outputs of up to four rows (BLOCK_M) over one share, multiplied and added in float32."""
    strip = tl.program_id(0)
    split = tl.program_id(1)
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    WIDTH: tl.constexpr = GROUP // 2
    ns = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    gs = tl.arange(0, GROUPS)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(K, BLOCK_K))
    row = tl.minimum(ns, N - 1).to(tl.int64)
    within = (gs[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])[None, :, :]
    weight_row = weight + row[:, None, None] * row_bytes
    scales_row = row[:, None] * row_groups
    if NESTED:
        shift = tl.load(scale_shift).to(tl.float32)
    else:
        shift = 0.0
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sums0 = tl.zeros([BLOCK_N, GROUPS, WIDTH], tl.float32)
    sums1 = tl.zeros([BLOCK_N, GROUPS, WIDTH], tl.float32)
    sums2 = tl.zeros([BLOCK_N, GROUPS, WIDTH], tl.float32)
    sums3 = tl.zeros([BLOCK_N, GROUPS, WIDTH], tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        k = block * BLOCK_K
        inside = k + gs * GROUP < K
        if EVEN_K:
            pairs = tl.load(weight_row + k // 2 + within, eviction_policy="evict_first")
        else:
            pairs = tl.load(
                weight_row + k // 2 + within, mask=inside[None, :, None], other=0, eviction_policy="evict_first"
            )
        at = scales_row + k // GROUP + gs[None, :]
        factor = scale_at(scale, scale_table, scale_scale, shift, at, inside[None, :], NESTED)[:, :, None]
        high, low = values_of(pairs, table, ASSEMBLY, x.dtype.element_ty)
        if HIGH_FIRST:
            one, two = high.to(tl.float32), low.to(tl.float32)
        else:
            one, two = low.to(tl.float32), high.to(tl.float32)
        even, odd = row_halves(x, x_stride, 0, rows, k, K, GROUPS, WIDTH)
        sums0 += (one * even + two * odd) * factor
        if BLOCK_M > 1:
            even, odd = row_halves(x, x_stride, 1, rows, k, K, GROUPS, WIDTH)
            sums1 += (one * even + two * odd) * factor
        if BLOCK_M > 2:
            even, odd = row_halves(x, x_stride, 2, rows, k, K, GROUPS, WIDTH)
            sums2 += (one * even + two * odd) * factor
            even, odd = row_halves(x, x_stride, 3, rows, k, K, GROUPS, WIDTH)
            sums3 += (one * even + two * odd) * factor
    ms = tl.arange(0, BLOCK_M)
    sums = total(sums0)[None, :]
    if BLOCK_M > 1:
        sums = tl.where((ms == 1)[:, None], total(sums1)[None, :], sums)
    if BLOCK_M > 2:
        sums = tl.where((ms == 2)[:, None], total(sums2)[None, :], sums)
        sums = tl.where((ms == 3)[:, None], total(sums3)[None, :], sums)
    finish(sums, ms, ns, rows, N, bias, residual, output, partial, counters, SPLITS, HAS_BIAS, HAS_RESIDUAL)


@triton.jit
def total(sums):
    """Add up [outputs, groups, columns] to [outputs]."""
    return tl.sum(tl.sum(sums, axis=2), axis=1)
