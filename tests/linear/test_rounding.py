"""Relative errors, and the share of them that rounding explains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_async_batching.linear.rounding import relative_error, rounding_tolerance, worst_relative_error


def test_relative_norms() -> None:
    want = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.0, 5.0]])
    got = want + torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.0, 0.25]])
    assert worst_relative_error(got, want) == pytest.approx(0.1)
    assert relative_error(got[2], want[2]) == pytest.approx(0.05)
    assert relative_error(got, want) < 0.02, "of all together"
    got[1, 0] = float("nan")
    assert worst_relative_error(got, want) != worst_relative_error(got, want)
    assert relative_error(got, want) != relative_error(got, want)


def test_zeros_are_compared_with_something() -> None:
    zeros = torch.zeros(1, 3)
    assert relative_error(zeros, zeros) == worst_relative_error(zeros, zeros) == 0.0


@pytest.mark.parametrize("error", [relative_error, worst_relative_error])
def test_an_infinity_that_both_have_is_no_difference(error: Any) -> None:
    inf = float("inf")
    want = torch.tensor([[3.0, 4.0, -inf, inf], [30.0, 40.0, -inf, 0.0]])
    assert error(want.clone(), want) == 0
    assert 0 < error(want + 0.01, want) < 0.01
    for place, other in (((0, 2), 0.0), ((0, 0), -inf), ((0, 2), inf), ((1, 3), float("nan"))):
        got = want.clone()
        got[place] = other
        assert not error(got, want) < 1e6, (place, other)


def test_tolerances_grow_with_the_rounding_of_the_dtype() -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    tolerances = [rounding_tolerance(dtype) for dtype in dtypes]
    assert tolerances == sorted(set(tolerances))
    assert rounding_tolerance(torch.float8_e4m3fn) == 0.1
