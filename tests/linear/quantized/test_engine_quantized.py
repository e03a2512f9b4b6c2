"""Quantized layers of a view: which are converted, that they equal their own forward, and what compiled code calls."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_async_batching.linear.quantized import engine_quantized, forms
from hf_async_batching.linear.quantized.engine_quantized import (
    EngineQuantized,
    convert_quantized,
    keep_equal,
    quantized_layers,
)
from hf_async_batching.linear.quantized.forms import FORMS, recognise
from hf_async_batching.linear.quantized.weight import QuantizedWeight
from hf_async_batching.model.compile.residual_fusion import fuse_residual_sums

bnb = pytest.importorskip("bitsandbytes")

COUNTERS = torch.zeros(256, dtype=torch.int32)


def layer(
    inputs: int = 128,
    outputs: int = 64,
    dtype: torch.dtype | None = torch.bfloat16,
    kind: str = "nf4",
    bias: bool = True,
) -> Any:
    made = bnb.nn.Linear4bit(inputs, outputs, bias=bias, compute_dtype=dtype, quant_type=kind)
    made = made.to(torch.bfloat16).to("cpu")
    made.support_avx512bf16_for_cpu = False
    assert made.weight.quant_state is not None
    return made.eval()


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_equals_its_own_forward(dtype: torch.dtype | None, kind: str) -> None:
    own = layer(dtype=dtype, kind=kind)
    x = torch.randn(1, 5, 128, dtype=torch.bfloat16)
    want = own(x)
    view = nn.Sequential(own)
    weight = own.weight
    assert convert_quantized(view, COUNTERS, skinny=True) == 1
    assert isinstance(view[0], EngineQuantized) and isinstance(view[0], bnb.nn.Linear4bit)
    assert view[0].weight is weight and view[0].quantized.packed.data_ptr() == weight.data_ptr()
    got = view(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)


def test_uncompiled_code_runs_the_own_forward_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    view = nn.Sequential(layer())
    convert_quantized(view, COUNTERS, skinny=False)
    monkeypatch.setattr(engine_quantized, "_product", lambda *_: pytest.fail("our product"))
    view(torch.randn(2, 128, dtype=torch.bfloat16))


@pytest.mark.parametrize("change", ["float32", "row ends within a block", "hook", "own forward", "not quantized"])
def test_what_is_not_known_stays(change: str) -> None:
    one = layer(96) if "block" in change else layer(dtype=torch.float32 if change == "float32" else torch.bfloat16)
    if change == "hook":
        one.register_forward_hook(lambda *_: None)
    elif change == "own forward":
        one.forward = lambda x: x
    elif change == "not quantized":
        one = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.bfloat16)
    assert recognise(one) is None
    assert convert_quantized(nn.Sequential(one, nn.Linear(4, 4)), COUNTERS, skinny=False) == 0


def test_a_kind_that_differs_keeps_its_own_forward(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    view = nn.Sequential(layer(), layer(kind="fp4"), layer())
    convert_quantized(view, COUNTERS, skinny=False)
    right = FORMS["nf4"].own
    monkeypatch.setattr(FORMS["nf4"], "own", lambda x, w, b: right(x, w, b) * 1.5)
    with caplog.at_level(logging.WARNING):
        failed = keep_equal(view)
    assert len(failed) == 1 and "nf4" in failed[0]
    assert len(caplog.records) == 1
    assert [type(one).__name__ for one in view] == ["Linear4bit", "EngineLinear4bit", "Linear4bit"]
    assert not hasattr(view[0], "quantized")
    assert quantized_layers(view) == [view[1]]


def test_a_product_that_raises_keeps_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    view = nn.Sequential(layer())
    convert_quantized(view, COUNTERS, skinny=False)

    def fail(*_: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(FORMS["nf4"], "own", fail)
    assert "no compiler" in keep_equal(view)[0]
    assert not quantized_layers(view)


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layer(128, 128), layer(128, 128, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x)
        return x + self.second(x)


def test_compiled_code_calls_our_operator_with_its_residual() -> None:
    view, x = Sums(), torch.randn(1, 3, 128, dtype=torch.bfloat16)
    want = view(x)
    convert_quantized(view, COUNTERS, skinny=False)
    merged: list[int] = []
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        merged.append(fuse_residual_sums(graph.graph))
        graph.recompile()
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled: Any = torch.compile(view, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    assert merged == [2]
    assert names == ["hf_async_batching.quantized_linear_add.default"] * 2


def test_layers_share_compiled_code() -> None:
    layers = nn.ModuleList(layer(128, 128) for _ in range(3))
    convert_quantized(layers, COUNTERS, skinny=False)
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        made.append(1)
        return graph

    def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return type(module).forward(module, x)

    compiled: Any = torch.compile(run, backend=backend, fullgraph=True)
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    for one in layers:
        assert isinstance(one, EngineQuantized)
        torch.testing.assert_close(compiled(one, x), one.product(x))
    assert len(made) == 1


def test_an_adapter_keeps_working_on_top() -> None:
    peft = pytest.importorskip("peft")
    base = nn.Sequential()
    base.add_module("proj", layer())
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["proj"], init_lora_weights=False)).eval()
    x = torch.randn(1, 5, 128, dtype=torch.bfloat16)
    want = model(x)
    assert convert_quantized(model, COUNTERS, skinny=True) == 1
    torch.testing.assert_close(model(x), want)
    with model.disable_adapter():
        assert not torch.allclose(model(x), want)


@pytest.mark.parametrize(
    ("form", "on_cuda", "served"), [("nf4", True, True), ("fp8 blocks", True, False), ("fp8 blocks", False, True)]
)
def test_on_a_card_the_forms_that_were_compared_there(
    form: str, on_cuda: bool, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = layer()
    packed: Any = SimpleNamespace(is_cuda=on_cuda)
    weight = QuantizedWeight(form, packed, (), 64, 128, 64)
    monkeypatch.setitem(forms._READERS, (type(one).__module__, type(one).__name__), lambda module: weight)
    assert (recognise(one) is weight) == served
