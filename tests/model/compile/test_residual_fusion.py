"""Sums of a product and a residual become one operator, and only those."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model
from torch import nn

from hf_async_batching.attention.select import make_backend
from hf_async_batching.checks import parity_check
from hf_async_batching.experts import hf_interface  # noqa: F401  (defines the operator)
from hf_async_batching.experts.layer import ExpertWeights, GateForm
from hf_async_batching.linear.engine_linear import MAX_STRIPS, convert
from hf_async_batching.model.compile import regions as compiled_regions
from hf_async_batching.model.compile.residual_fusion import fuse_expert_sums, fuse_residual_sums
from hf_async_batching.model.forward.packed_forward import PackedForward


class Sums(nn.Module):
    def __init__(self, which: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        for layer in (self.first, self.second):
            convert(layer, torch.zeros(MAX_STRIPS, dtype=torch.int32), skinny=False)
        self.which = which

    def forward(self, x: torch.Tensor) -> Any:
        product = self.first(x)
        match self.which:
            case "left":
                return product + x
            case "right":
                return x + product
            case "in place":
                x = x.clone()
                x += product
                return x
            case "of two":
                return self.second(x) + product
            case "used twice":
                return product + x, product * 2
            case "itself":
                return product + product
            case "a row":
                return product + x[:1]
            case "a number":
                return product + 1
            case "another type":
                return product + x.double()
        raise AssertionError(self.which)


@pytest.mark.parametrize(
    ("which", "merged"),
    [
        *(("left", 1), ("right", 1), ("in place", 1), ("of two", 1)),
        *(("used twice", 0), ("itself", 0), ("a row", 0), ("a number", 0), ("another type", 0)),
    ],
)
def test_which_sums_are_merged(which: str, merged: int) -> None:
    torch._dynamo.reset()
    counts: list[int] = []

    def compiler(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        counts.append(fuse_residual_sums(module.graph))
        module.graph.lint()
        module.recompile()
        return module.forward

    model = Sums(which)
    x = torch.randn(5, 8)
    with torch.no_grad():
        expected, actual = model(x), torch.compile(model, backend=compiler, fullgraph=True)(x)
    torch.testing.assert_close(actual, expected)
    assert counts == [merged]


class ExpertSums(nn.Module):
    """A layer of experts as transformers' modules call it: over tokens in one dimension."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 16)), nn.Parameter(torch.randn(3, 16, 4))
        self.which = which

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
        flat = x.reshape(-1, 16)
        layer = ExpertWeights(self.up, None, self.down, None, False)
        experts = torch.ops.hf_async_batching.experts(flat, index, weights, *layer, *GateForm())
        match self.which:
            case "behind a view":
                return x + experts.view(1, -1, 16)
            case "in front":
                return experts.reshape(x.shape) + x
            case "flat":
                return flat + experts
            case "in place":
                x = x.clone()
                x += experts.view(x.shape)
                return x
            case "used twice":
                return x + experts.view(x.shape), experts * 2
            case "a number":
                return experts + 1
            case "another shape":
                return experts.view(x.shape) + x[:, :1]
            case "another type":
                return experts + flat.double()
            case "doubled":
                return experts * 2 + flat
        raise AssertionError(self.which)


@pytest.mark.parametrize(
    ("which", "merged"),
    [
        *((which, 1) for which in ("behind a view", "in front", "flat", "in place")),
        *((which, 0) for which in ("used twice", "a number", "another shape", "another type", "doubled")),
    ],
)
def test_which_sums_of_experts_are_merged(which: str, merged: int) -> None:
    pytest.importorskip("triton")
    torch._dynamo.reset()
    counts: list[int] = []

    def compiler(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        counts.append(fuse_expert_sums(module.graph))
        module.graph.lint()
        module.recompile()
        return module.forward

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ExpertSums(which).to(device)
    x, weights = torch.randn(1, 5, 16, device=device), torch.rand(5, 2, device=device)
    index = torch.tensor([[0, 1], [2, 1], [1, 0], [2, 0], [0, 2]], device=device)
    with torch.no_grad():
        expected = model(x, index, weights)
        actual = torch.compile(model, backend=compiler, fullgraph=True)(x, index, weights)
    torch.testing.assert_close(actual, expected)
    assert counts == [merged]


def test_both_sums_of_a_layer_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    merged: list[int] = []

    def count(graph: torch.fx.Graph) -> int:
        merged.append(fuse_residual_sums(graph))
        return merged[-1]

    monkeypatch.setattr(compiled_regions, "fuse_residual_sums", count)
    forward = PackedForward(tiny_model("Llama"), fused=True)
    parity_check.compile_checked(forward, make_backend("auto", torch.device("cpu")), "eager")
    assert sorted(merged) == [0, 0, 2], "attention's and the feed-forward's, in the graph that all layers share"
    torch._dynamo.reset()
