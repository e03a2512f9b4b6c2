"""How much rounding may make logits differ."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_async_batching.checks import logits_tolerance as module
from hf_async_batching.checks.logits_tolerance import logits_tolerance

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


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
