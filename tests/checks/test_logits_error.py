"""How much logits may differ."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_async_batching.checks import logits_error as module
from hf_async_batching.checks.logits_error import logits_error, logits_tolerance, worst_error

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_relative_norms() -> None:
    want = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.0, 5.0]])
    got = want + torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.0, 0.25]])
    assert worst_error(got, want) == pytest.approx(0.1)
    assert logits_error(got[2], want[2]) == pytest.approx(0.05)
    assert logits_error(got, want) < 0.02, "of all together"
    got[1, 0] = float("nan")
    assert worst_error(got, want) != worst_error(got, want)
    assert logits_error(got, want) != logits_error(got, want)


def test_zeros_are_compared_with_something() -> None:
    assert logits_error(torch.zeros(3), torch.zeros(3)) == worst_error(torch.zeros(1, 3), torch.zeros(1, 3)) == 0.0


@pytest.mark.parametrize("error", [logits_error, worst_error])
def test_an_infinity_that_both_have_is_no_difference(error: Any) -> None:
    inf = float("inf")
    want = torch.tensor([[3.0, 4.0, -inf, inf], [30.0, 40.0, -inf, 0.0]])
    assert error(want.clone(), want) == 0
    assert 0 < error(want + 0.01, want) < 0.01
    for place, other in (((0, 2), 0.0), ((0, 0), -inf), ((0, 2), inf), ((1, 3), float("nan"))):
        got = want.clone()
        got[place] = other
        assert not error(got, want) < 1e6, (place, other)


@pytest.mark.parametrize(
    ("dtype", "device", "precision", "quantized", "tolerance"),
    [
        (torch.float64, CPU, "highest", False, 1e-6),
        (torch.float32, CPU, "high", False, 2e-4),
        (torch.float32, CUDA, "highest", False, 2e-4),
        (torch.float32, CUDA, "high", False, 5e-3),
        (torch.float16, CUDA, "high", False, 3e-2),
        (torch.bfloat16, CPU, "highest", False, 1e-1),
        (torch.float32, CPU, "highest", True, 5e-2),
        (torch.bfloat16, CPU, "highest", True, 1e-1),
    ],
)
def test_tolerances(
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
    quantized: bool,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    monkeypatch.setattr(module, "is_quantized", lambda _: quantized)
    forward: Any = SimpleNamespace(dtype=dtype, device=device, view=torch.nn.Linear(2, 2, dtype=dtype))
    assert logits_tolerance(forward) == tolerance


def test_logits_in_float32_of_weights_in_bfloat16_are_as_exact_as_the_weights() -> None:
    """Mamba's kin return such."""
    weights = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    weights.A_log = torch.nn.Parameter(torch.zeros(4))
    forward: Any = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"), view=weights)
    assert logits_tolerance(forward) == 1e-1
