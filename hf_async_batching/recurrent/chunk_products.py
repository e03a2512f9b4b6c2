# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Matrix products of chunks: bfloat16 on tensor cores, float32 values as the sum of two bfloat16 ones.

A float32 value rounded to bfloat16 keeps 8 bits, its rounding error as a second bfloat16 the next 8. Products of
inputs, which are bfloat16 themselves, with such pairs have errors of about 2**-17. Products of the rounded values
alone would have several times the error of transformers' own function where keys are alike.
"""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]


@triton.jit
def halves(x):
    """A float32 tensor as two bfloat16 tensors, whose sum it is up to 2**-17 of its values."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def input_times(a, b):
    """Product of a bfloat16 and a float32 matrix."""
    high, low = halves(b)
    return tl.dot(a, high, tl.dot(a, low))


@triton.jit
def times_input(a, b):
    """Product of a float32 and a bfloat16 matrix."""
    high, low = halves(a)
    return tl.dot(high, b, tl.dot(low, b))


@triton.jit
def halves_times(high, low, b):
    """Product of a matrix, given as its halves, and a float32 matrix."""
    b_high, b_low = halves(b)
    return tl.dot(high, b_high, tl.dot(high, b_low, tl.dot(low, b_high)))


@triton.jit
def decays(logarithms, inside):
    """Logarithms [tokens] of decays in a chunk: their sums up to each token, and the decay [i, j] from token j to i.

    Decays of tokens after `i` are 0. A logarithm below -104 is one of 0 in float32, and would cost the sums precision.
    """
    logarithms = tl.where(logarithms < -104.0, -104.0, logarithms)
    sums = tl.cumsum(tl.where(inside, logarithms, 0.0), 0)
    i = tl.arange(0, logarithms.shape[0])
    between = tl.where(i[:, None] >= i[None, :], sums[:, None] - sums[None, :], float("-inf"))
    return sums, tl.exp(between)
