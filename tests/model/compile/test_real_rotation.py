"""Rotations by complex numbers become real arithmetic with the same results."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hf_async_batching.model.compile.real_rotation import make_rotations_real


def traced(function: Any, *inputs: torch.Tensor) -> tuple[int, torch.Tensor, str]:
    """Rotations replaced in Dynamo's graph of a function, the graph's result, and its code."""
    seen: list[tuple[int, str]] = []

    def backend(module: fx.GraphModule, _: list[torch.Tensor]) -> Any:
        count = make_rotations_real(module.graph)
        module.graph.lint()
        module.recompile()
        seen.append((count, module.code))
        return module.forward

    torch._dynamo.reset()
    out = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)(*inputs)
    return *seen[0][:1], out, seen[0][1]


def rotate(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * frequencies.unsqueeze(1)).flatten(3).type_as(x)


def test_a_rotation_is_real_arithmetic() -> None:
    x, angles = torch.randn(1, 4, 5, 8), torch.randn(1, 5, 4)
    frequencies = torch.polar(torch.ones_like(angles), angles)
    count, got, code = traced(rotate, x, frequencies)
    assert count == 1
    assert "view_as_complex" not in code
    torch.testing.assert_close(got, rotate(x, frequencies), rtol=0, atol=1e-6)


def test_other_uses_of_complex_numbers_stay() -> None:
    def other(x: torch.Tensor) -> torch.Tensor:
        numbers = torch.view_as_complex(x)
        product = numbers * 2.0
        return torch.view_as_real(product) + torch.view_as_real(product + numbers)

    x = torch.randn(3, 2)
    count, got, _ = traced(other, x)
    assert count == 0
    torch.testing.assert_close(got, other(x))
