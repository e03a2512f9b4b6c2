# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Device side of the arg-max; `argmax` is the typed door to it."""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.core import outcomes

_FIRST_UNSOUND: tl.constexpr = tl.constexpr(outcomes.FIRST_UNSOUND)


# One kernel for any number of parts.
@triton.jit(do_not_specialize=["blocks", "parts"])
def parts_kernel(logits, values, indices, vocab, stride, blocks, parts, BLOCK: tl.constexpr):
    """One program: the largest logit of one part of one row, the first of equals."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for block in range(part * blocks, (part + 1) * blocks):
        at = block * BLOCK + lanes
        found = tl.load(logits + row * stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        found = tl.where(found != found, float("inf"), found)
        # A lane meets its indices in order: of equals the first stays. The first index of a row of -inf counts, too.
        better = (found > best) | ((where == 0x7FFFFFFF) & (at < vocab))
        best = tl.where(better, found, best)
        where = tl.where(better, at, where)
    largest = tl.max(best, 0)
    tl.store(values + row * parts + part, largest)
    tl.store(indices + row * parts + part, tl.min(tl.where(best == largest, where, 0x7FFFFFFF), 0))


@triton.jit(do_not_specialize=["parts"])
def compare_kernel(values, indices, out, parts, MAX_PARTS: tl.constexpr):
    """One program: the best part of one row, marked where it is not finite."""
    row, part = tl.program_id(0), tl.arange(0, MAX_PARTS)
    value = tl.load(values + row * parts + part, mask=part < parts, other=float("-inf"))
    index = tl.load(indices + row * parts + part, mask=part < parts, other=0x7FFFFFFF)
    best = tl.max(value, 0)
    token = tl.min(tl.where(value == best, index, 0x7FFFFFFF), 0)
    finite = (best > float("-inf")) & (best < float("inf"))
    tl.store(out + row, tl.where(finite, token, _FIRST_UNSOUND - token))
