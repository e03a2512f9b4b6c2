"""How much two results differ, and how much rounding alone can make them differ."""

from __future__ import annotations

import torch

# Relative errors that another order of sums can cause.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference, relative to the norm of `want`.

    Equal infinities count as equal: some models give -inf to tokens that only pad their vocabulary.

    Args:
        got: Float tensor of any shape.
        want: Float tensor of the same shape.
    """
    difference, size = _parts(got, want)
    return float(difference.norm() / size.norm().clamp(min=1e-6))


def worst_relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest `relative_error` of all positions; NaN if any position has NaN.

    Args:
        got: Float [positions, size].
        want: Float, of the same shape.
    """
    difference, size = _parts(got, want)
    return float((difference.norm(dim=-1) / size.norm(dim=-1).clamp(min=1e-6)).max())


def rounding_tolerance(dtype: torch.dtype) -> float:
    """The relative error that rounding can cause in a dtype."""
    return _TOLERANCE.get(dtype, 1e-1)


def _parts(got: torch.Tensor, want: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The difference, and the values that it is compared with."""
    return (got - want).masked_fill(got == want, 0), want.masked_fill(want.isinf(), 0)
