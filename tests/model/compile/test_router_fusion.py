"""Routers' choices and products become our operators in traced graphs, and only where these compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_async_batching.attention.select import make_backend
from hf_async_batching.checks import parity_check
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.linear.engine_linear import MAX_STRIPS, convert
from hf_async_batching.model.compile import regions as compiled_regions
from hf_async_batching.model.compile.router_fusion import fuse_routers
from hf_async_batching.model.forward.packed_forward import PackedForward


class Router(nn.Module):
    def __init__(self, which: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.which = which
        self.layer = nn.Linear(16, 16, dtype=dtype)
        convert(self.layer, torch.zeros(MAX_STRIPS, dtype=torch.int32), skinny=False)
        self.weight = nn.Parameter(torch.randn(12, 16, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(12, dtype=dtype))

    def forward(self, x: torch.Tensor) -> Any:
        logits = functional.linear(x, self.weight)
        match self.which:
            case "of softmax":
                values, index = torch.topk(functional.softmax(logits, dim=-1, dtype=torch.float), 4, dim=-1)
                values /= values.sum(dim=-1, keepdim=True)
                return values.to(logits.dtype), index
            case "of a method's softmax":
                values, index = logits.softmax(1, dtype=torch.float32).topk(k=3)
                return values, index
            case "of logits":
                values, index = torch.topk(logits, 4, dim=-1)
                return functional.softmax(values, dim=1, dtype=values.dtype), index
            case "in any order":
                return torch.topk(logits, 4, dim=-1, sorted=False)[0].sort().values
            case "of groups":
                return logits.sigmoid().view(-1, 3, 4).topk(2, dim=-1)[0].sum(-1), logits
            case "softmax used twice":
                scores = functional.softmax(logits, dim=-1, dtype=torch.float)
                return scores.topk(2)[1], scores.sum(-1)
            case "softmax over rows":
                return functional.softmax(logits, dim=0, dtype=torch.float).topk(2)[1]
            case "softmax in its own dtype":
                return functional.softmax(logits, dim=-1).topk(2)[1]
            case "the smallest":
                return torch.topk(logits, 2, dim=-1, largest=False)[1]
            case "over rows":
                return logits.topk(2, dim=0)[1]
            case "too many":
                return torch.cat([logits] * 3, -1).topk(33)[0]
            case "too long":
                return torch.cat([logits] * 100, -1).topk(2)[0]
            case "wide numbers":
                return logits.double().topk(2)[1]
        raise AssertionError(self.which)


def run(model: nn.Module, x: torch.Tensor) -> tuple[Any, Any, tuple[int, int], list[str]]:
    """Expected and actual results, what was replaced, and the operators of the graph."""
    torch._dynamo.reset()
    counts: list[tuple[int, int]] = []
    targets: list[str] = []

    def compiler(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        counts.append(fuse_routers(module.graph))
        module.graph.lint()
        module.recompile()
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    with torch.no_grad():
        expected, actual = model(x), torch.compile(model, backend=compiler, fullgraph=True)(x)
    return expected, actual, counts[0], targets


@pytest.mark.parametrize(
    ("which", "choices", "softmax_stays"),
    [
        ("of softmax", 1, False),
        ("of a method's softmax", 1, False),
        ("of logits", 1, True),
        ("in any order", 1, False),
        ("of groups", 1, False),
        ("softmax used twice", 1, True),
        ("softmax over rows", 1, True),
        ("softmax in its own dtype", 1, False),
        *((which, 0, False) for which in ("the smallest", "over rows", "too many", "too long", "wide numbers")),
    ],
)
def test_which_choices_are_replaced(which: str, choices: int, softmax_stays: bool) -> None:
    torch.manual_seed(0)
    expected, actual, counts, targets = run(Router(which), torch.randn(5, 16))
    assert counts[0] == choices
    assert any("softmax" in target for target in targets) == softmax_stays
    assert any("topk" in target and "hf_async_batching" not in target for target in targets) == (not choices)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_a_softmax_in_16_bits_stays() -> None:
    _, _, counts, targets = run(Router("softmax in its own dtype", torch.bfloat16), torch.randn(5, 16).bfloat16())
    assert counts[0] == 1 and any("softmax" in target for target in targets)


class WithLayer(Router):
    """A router beside a linear layer of the engine, whose scratch memory the router's product uses."""

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.layer(x)
        weight = self.weight * 2 if self.which == "of a result" else self.weight
        if self.which == "wider":
            return functional.linear(hidden.float(), weight.float()), hidden
        return functional.linear(hidden, weight, self.bias), hidden


@pytest.mark.parametrize(
    ("which", "dtype", "products"),
    [
        ("plain", torch.bfloat16, 1),
        ("plain", torch.float32, 0),
        ("of a result", torch.bfloat16, 0),
        ("wider", torch.bfloat16, 0),
    ],
)
def test_which_products_are_replaced(which: str, dtype: torch.dtype, products: int) -> None:
    expected, actual, counts, targets = run(WithLayer(which, dtype), torch.randn(5, 16).to(dtype))
    assert counts == (0, products)
    assert sum("hf_async_batching.linear" in target for target in targets) == 1 + products
    torch.testing.assert_close(actual, expected)


def test_without_a_linear_layer_of_the_engine_products_stay() -> None:
    _, _, counts, _ = run(Router("of logits", torch.bfloat16), torch.randn(5, 16).bfloat16())
    assert counts == (1, 0)


@pytest.mark.parametrize(
    "class_name",
    [
        "Qwen3MoeForCausalLM",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("DeepseekV3ForCausalLM", "GptOssForCausalLM", "Lfm2MoeForCausalLM")
        ),
    ],
)
def test_routers_of_families(class_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `topk` of these families' layers is replaced, and the compiled logits pass the check."""
    torch._dynamo.reset()
    replaced: list[int] = []
    left: list[str] = []

    def count(graph: torch.fx.Graph) -> tuple[int, int]:
        found = fuse_routers(graph)
        replaced.append(found[0])
        left.extend(str(node.target) for node in graph.nodes if node.target in (torch.topk, "topk"))
        return found

    monkeypatch.setattr(compiled_regions, "fuse_routers", count)
    forward = PackedForward(tiny_model(class_name), fused=True)
    parity_check.compile_checked(forward, make_backend("auto", torch.device("cpu")), "eager")
    assert sum(replaced) >= 1 and not left
    torch._dynamo.reset()
