"""Sums of a product and a residual become one operator, and only those."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model
from torch import nn

from hf_async_batching.attention.select import make_backend
from hf_async_batching.checks import parity_check
from hf_async_batching.linear.engine_linear import MAX_STRIPS, convert
from hf_async_batching.model.compile import regions as compiled_regions
from hf_async_batching.model.compile.residual_fusion import fuse_residual_sums
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
