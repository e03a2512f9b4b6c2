# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""The end of a product's kernel: shares of the inner dimension are added up, then bias and residual."""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]


@triton.jit
def finish(
    sums,
    ms,
    ns,
    rows,
    N,
    bias,
    residual,
    output,
    partial,
    counters,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Store the sums [rows, outputs] of a program; with shares, the last program to arrive stores the strip.

    It adds the shares in their order, so that the result does not depend on which program was last. Its counter is
    back at zero for the next launch. The program's axes are (strip, share).
    """
    at = ms[:, None] * N + ns[None, :]
    mask = (ms < rows)[:, None] & (ns < N)[None, :]
    if SPLITS == 1:
        store(sums, at, mask, ns, N, bias, residual, output, HAS_BIAS, HAS_RESIDUAL)
    else:
        strip = tl.program_id(0)
        size = rows.to(tl.int64) * N
        tl.store(partial + tl.program_id(1) * size + at, sums, mask=mask)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + strip, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            tl.store(counters + strip, 0)
            total = tl.zeros(sums.shape, tl.float32)
            for share in range(SPLITS):
                total += tl.load(partial + share * size + at, mask=mask, other=0.0, cache_modifier=".cg")
            store(total, at, mask, ns, N, bias, residual, output, HAS_BIAS, HAS_RESIDUAL)


@triton.jit
def store(sums, at, mask, ns, N, bias, residual, output, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """Store complete sums in the output's dtype, with bias and residual added."""
    if HAS_BIAS:
        sums += tl.load(bias + ns, mask=ns < N, other=0.0)[None, :].to(tl.float32)
    if HAS_RESIDUAL:
        # Rounded first, as where the sum is a kernel of its own.
        sums = sums.to(output.dtype.element_ty).to(tl.float32)
        sums += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + at, sums.to(output.dtype.element_ty), mask=mask)
