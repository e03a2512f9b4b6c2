# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Device side of a router's choice; `topk` is the typed door to it."""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]


@triton.jit
def topk_kernel(
    x,
    out,
    x_row,
    E,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: the K largest of one row, the first of equal ones first.

    A score and its place are one number of 64 bits: above, the score as an integer of the same order; below, the
    place, counted from the end. So the largest number is the first of the largest scores.
    """
    row = tl.program_id(0).to(tl.int64)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.arange(0, BLOCK)
    inside = at < E
    score = tl.load(x + row * x_row + at, mask=inside, other=float("-inf")).to(tl.float32)
    if SOFTMAX:
        score = tl.exp(score - tl.max(score, 0))
        score = score / tl.sum(score, 0)
    bits = score.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(score != score, 0x7FFFFFFF, order)  # torch takes NaN for the largest number
    least = -0x8000000000000000
    packed = tl.where(inside, (order.to(tl.int64) << 32) | (BLOCK - 1 - at).to(tl.int64), least)
    column = tl.arange(0, CHOSEN)
    chosen = tl.zeros([CHOSEN], tl.int64)
    for k in tl.static_range(K):
        best = tl.max(packed, 0)
        chosen = tl.where(column == k, best, chosen)
        packed = tl.where(packed == best, least, packed)
    order = (chosen >> 32).to(tl.int32)
    place = BLOCK - 1 - (chosen & 0xFFFFFFFF).to(tl.int32)
    to = out + row * (2 * K) + column
    tl.store(to, tl.where(order < 0, order ^ 0x7FFFFFFF, order), mask=column < K)
    tl.store(to + K, place, mask=column < K)
