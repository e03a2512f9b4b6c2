# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Device side of the experts; `triton_experts` is the typed door to it.

An assignment is one pair of a token and an expert that the router chose for it: assignment `token * K + k`. The
assignments are sorted by expert, and a block is up to BLOCK_M neighbours of one expert. A product multiplies weight by
activations (not the reverse), so that the weight, not the few rows, fills the wide side of the tensor cores.

Each kernel waits for its predecessor before it reads or writes anything (EARLY, programmatic dependent launch).
"""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.experts.mxfp4_tiles import packed_sums


@triton.jit
def _begin(EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _experts_at(ids, at, assignments, E, EXPERTS: tl.constexpr):
    """Experts of some assignments; the last bin stands for ids that are no expert of this rank, and for no id."""
    expert = tl.load(ids + at, mask=at < assignments, other=-1).to(tl.int32)
    return tl.where((expert >= 0) & (expert < E), expert, EXPERTS - 1)


@triton.jit(do_not_specialize=["assignments", "slots"])
def group_kernel(
    ids,
    order,
    places,
    ends,
    blocks,
    assignments,
    slots,
    E,
    SIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: the assignments of one expert, in their order, and its blocks.

    Each program counts the assignments of all experts, so that no program waits for another.
    """
    me = tl.program_id(0)
    _begin(EARLY)
    bins = tl.arange(0, EXPERTS)
    counts = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, assignments, SIZE):
        at = first + tl.arange(0, SIZE)
        counts += tl.histogram(_experts_at(ids, at, assignments, E, EXPERTS), EXPERTS)
    counts = tl.where(bins < E, counts, 0)
    begin = tl.sum(tl.where(bins < me, counts, 0), 0)
    mine = tl.sum(tl.where(bins == me, counts, 0), 0)
    tl.store(ends + me, begin + mine)
    blocks_of = (counts + BLOCK_M - 1) // BLOCK_M
    if me == 0:
        used = tl.sum(blocks_of, 0)
        for first in range(0, slots, EXPERTS):
            slot = first + bins
            tl.store(blocks + slot * 3, slot * 0 - 1, mask=(slot >= used) & (slot < slots))
    block = tl.sum(tl.where(bins < me, blocks_of, 0), 0)
    for first in range(0, mine, BLOCK_M):
        at = blocks + (block + first // BLOCK_M) * 3
        tl.store(at, me)
        tl.store(at + 1, begin + first)
        tl.store(at + 2, begin + tl.minimum(first + BLOCK_M, mine))
    if mine > 0:
        place = begin
        for first in range(0, assignments, SIZE):
            at = first + tl.arange(0, SIZE)
            match = _experts_at(ids, at, assignments, E, EXPERTS) == me
            ones = tl.where(match, 1, 0)
            to = place + tl.cumsum(ones, 0) - 1
            tl.store(order + to, at, mask=match)
            tl.store(places + at, to, mask=match)
            place += tl.sum(ones, 0)


@triton.jit
def _activation(x, alpha, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x * alpha)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(y)) is sigmoid(2 y).
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu2":
        x = tl.where(x < 0, 0.0, x)
        x = x * x
    return x


@triton.jit
def _gated(gate, up, alpha, limit, shift, ACTIVATION: tl.constexpr, LIMITED: tl.constexpr):
    if LIMITED:  # comparisons with NaN are false, so NaN stays
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, up)
        up = tl.where(up < -limit, -limit, up)
    return _activation(gate, alpha, ACTIVATION) * (up + shift)


@triton.jit
def _up_columns(strip, N, BLOCK: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Columns of the first product's outputs for BLOCK columns of its activations, and which of them there are.

    A gated product computes as many gates as inputs to them: its outputs are twice as many.
    """
    if GATED and not INTERLEAVED:
        local = tl.arange(0, 2 * BLOCK)
        half = local // BLOCK
        inner = strip * BLOCK + local - half * BLOCK
        column = half * N + inner
        inside = inner < N
    elif GATED:
        column = strip * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
        inside = column < 2 * N
    else:
        column = strip * BLOCK + tl.arange(0, BLOCK)
        inside = column < N
    return column, inside


@triton.jit
def product_kernel(
    x,
    weight,
    scales,
    bias,
    out,
    ids,
    order,
    blocks,
    K,
    E,
    N,
    INNER,
    x_stride,
    weight_e,
    weight_n,
    weight_k,
    scale_e,
    scale_n,
    scale_g,
    bias_e,
    alpha,
    limit,
    shift,
    GROUPED: tl.constexpr,
    UP: tl.constexpr,
    PACKED: tl.constexpr,
    ASM: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMITED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: BLOCK_N outputs of one block of assignments.

    UP reads the tokens of its assignments, applies the activation, and writes the rows in sorted order. The second
    product reads sorted rows and writes each to the place of its assignment. If not GROUPED, there is one token, and
    block `k` is its assignment `k`. PACKED weights have strides in groups, 4 words each.
    """
    strip = tl.program_id(0)
    block = tl.program_id(1)
    _begin(EARLY)
    if GROUPED:
        expert = tl.load(blocks + block * 3)
        if expert < 0:
            return
        begin = tl.load(blocks + block * 3 + 1)
        end = tl.load(blocks + block * 3 + 2)
    else:
        expert = tl.load(ids + block).to(tl.int32)
        if (expert < 0) | (expert >= E):
            return
        begin = block
        end = block + 1
    rows = begin + tl.arange(0, BLOCK_M)
    present = rows < end
    # Rows that are not there stand for the first, without reading it: 16 copies would come from the same cache lines.
    rows = tl.where(present, rows, begin)
    if GROUPED:
        assignment = tl.load(order + rows)
    else:
        assignment = rows
    if UP:
        source = assignment // K
        target = rows
    else:
        source = rows
        target = assignment

    column, inside = _up_columns(strip, N, BLOCK_N, GATED, INTERLEAVED)
    ks = tl.arange(0, BLOCK_K)
    ROWS: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    x_at = x + source.to(tl.int64)[:, None] * x_stride + ks[None, :]
    total = tl.zeros([ROWS, BLOCK_M], tl.float32)
    if PACKED:
        # Triton sees that each row begins at 16 bytes, and copies as many.
        mine = weight + 4 * (expert.to(tl.int64) * weight_e + column[:, None] * weight_n)
        my_scales = scales + expert.to(tl.int64) * scale_e + column[:, None] * scale_n
        total = packed_sums(
            total,
            mine + tl.arange(0, BLOCK_K // 8)[None, :],
            my_scales + tl.arange(0, BLOCK_K // 32)[None, :] * scale_g,
            x_at,
            inside,
            present,
            INNER,
            scale_g,
            ROWS,
            BLOCK_M,
            BLOCK_K,
            EVEN_N,
            EVEN_K,
            ASM,
        )
    else:
        weight_at = weight + expert.to(tl.int64) * weight_e + column[:, None] * weight_n + ks[None, :] * weight_k
        for k in range(0, INNER, BLOCK_K):
            if EVEN_K and EVEN_N:
                w = tl.load(weight_at, eviction_policy="evict_first")
                a = tl.load(x_at, mask=present[:, None], other=0.0, eviction_policy="evict_last")
            elif EVEN_K:
                w = tl.load(weight_at, mask=inside[:, None], other=0.0, eviction_policy="evict_first")
                a = tl.load(x_at, mask=present[:, None], other=0.0, eviction_policy="evict_last")
            else:
                within = (k + ks < INNER)[None, :]
                w = tl.load(weight_at, mask=inside[:, None] & within, other=0.0, eviction_policy="evict_first")
                a = tl.load(x_at, mask=present[:, None] & within, other=0.0, eviction_policy="evict_last")
            total = tl.dot(w, tl.trans(a), total, input_precision="ieee")
            weight_at += BLOCK_K * weight_k
            x_at += BLOCK_K
    if HAS_BIAS:
        added = tl.load(bias + expert.to(tl.int64) * bias_e + column, mask=inside, other=0.0)
        total += added.to(tl.float32)[:, None]
    if GATED:
        if INTERLEAVED:
            pairs = tl.permute(tl.reshape(total, [BLOCK_N, 2, BLOCK_M]), (0, 2, 1))
        else:
            pairs = tl.permute(tl.reshape(total, [2, BLOCK_N, BLOCK_M]), (1, 2, 0))
        gate, up = tl.split(pairs)
        value = _gated(gate, up, alpha, limit, shift, ACTIVATION, LIMITED)
    else:
        value = _activation(total, alpha, ACTIVATION)
    columns = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    at = target.to(tl.int64)[:, None] * N + columns[None, :]
    mask = present[:, None] & (columns < N)[None, :]
    tl.store(out + at, tl.trans(value).to(out.dtype.element_ty), mask=mask)


@triton.jit
def combine_kernel(
    product,
    bias,
    ids,
    weights,
    places,
    residual,
    out,
    E,
    H,
    bias_e,
    K: tl.constexpr,
    SORTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: the weighted sum over one token's experts, in the order of the router's choices.

    The rows of `product` lie by assignment; if SORTED, at `places`, and the bias is still to be added. A residual is
    added to the rounded sum.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    _begin(EARLY)
    mask = column < H
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        assignment = token * K + k
        expert = tl.load(ids + assignment).to(tl.int64)
        known = (expert >= 0) & (expert < E)
        if SORTED:
            row = tl.load(places + assignment).to(tl.int64)
        else:
            row = assignment
        # What is no expert has written nothing: its row can hold NaN.
        value = tl.load(product + row * H + column, mask=column < tl.where(known, H, 0), other=0.0).to(tl.float32)
        if HAS_BIAS:
            mine = bias + tl.where(known, expert, 0) * bias_e
            value += tl.load(mine + column, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(known, value * tl.load(weights + assignment).to(tl.float32), 0.0)
    if HAS_RESIDUAL:
        total = total.to(out.dtype.element_ty).to(tl.float32)
        total += tl.load(residual + token * H + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def activate_kernel(
    product,
    bias,
    out,
    ids,
    order,
    ends,
    E,
    N,
    bias_e,
    alpha,
    limit,
    shift,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMITED: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: the activation of some outputs of one sorted row, after its bias."""
    row = tl.program_id(0)
    strip = tl.program_id(1)
    _begin(EARLY)
    if row >= tl.load(ends + E - 1):
        return  # an assignment to no expert of this rank
    column = strip * BLOCK + tl.arange(0, BLOCK)
    source, inside = _up_columns(strip, N, BLOCK, GATED, INTERLEAVED)
    width = 2 * N if GATED else N
    value = tl.load(product + row.to(tl.int64) * width + source, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        expert = tl.load(ids + tl.load(order + row)).to(tl.int64)
        value += tl.load(bias + expert * bias_e + source, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        if INTERLEAVED:
            pairs = tl.reshape(value, [BLOCK, 2])
        else:
            pairs = tl.permute(tl.reshape(value, [2, BLOCK]), (1, 0))
        gate, up = tl.split(pairs)
        value = _gated(gate, up, alpha, limit, shift, ACTIVATION, LIMITED)
    else:
        value = _activation(value, alpha, ACTIVATION)
    tl.store(out + row.to(tl.int64) * N + column, value.to(out.dtype.element_ty), mask=column < N)
