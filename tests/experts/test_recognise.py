"""What the kernels know is recognised by its values, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.experts import reference
from hf_async_batching.experts.layer import GateForm
from hf_async_batching.experts.recognise import choices_of, dispatches, form_of, idle_bytes, weights_of
from hf_async_batching.linear.rounding import worst_relative_error
from hf_async_batching.model.view import wide_tensor

GPT_OSS = GateForm(interleaved=True, alpha=1.702, limit=7.0, shift=1.0)
FORMS = {
    "Qwen3MoeForCausalLM": GateForm(),
    "DeepseekV4ForCausalLM": GateForm(limit=10.0),
    "GptOssForCausalLM": GPT_OSS,
    "MiniMaxM3VLForCausalLM": GPT_OSS._replace(interleaved=False),
    "NemotronHForCausalLM": GateForm("relu2", gated=False),
    "AriaTextForCausalLM": GateForm(),
    "BeamForCausalLM": GateForm(),
    "Inkling2ForCausalLM": None,
}


def experts_of(class_name: str) -> Any:
    try:
        model = tiny_model(class_name)
    except Exception:
        pytest.skip(f"this release of transformers has no {class_name}")
    module = next((module for module in model.modules() if dispatches(module)), None)
    if module is None:
        pytest.skip(f"in this release of transformers {class_name} does not dispatch its experts")
    return module


@pytest.mark.parametrize("class_name", FORMS)
def test_families(class_name: str) -> None:
    module = experts_of(class_name)
    assert form_of(module) == FORMS[class_name]


@pytest.mark.parametrize("class_name", ["Qwen3MoeForCausalLM", "GptOssForCausalLM", "NemotronHForCausalLM"])
@torch.no_grad()
def test_the_reference_computes_what_the_family_does(class_name: str) -> None:
    module = experts_of(class_name)
    torch.manual_seed(0)
    layer, form = weights_of(module), form_of(module)
    assert form is not None
    hidden, index = torch.randn(9, layer.hidden), torch.rand(9, layer.experts).topk(2).indices
    weights = torch.rand(9, 2)
    got = reference.experts(hidden, index, weights, layer, form)
    assert worst_relative_error(got, module(hidden, index, weights)) < 1e-5


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("silu", GateForm()),
        ("swish", GateForm()),
        ("gelu", GateForm("gelu")),
        ("gelu_pytorch_tanh", GateForm("gelu_tanh")),
        ("gelu_new", GateForm("gelu_tanh")),
        ("quick_gelu", GateForm(alpha=1.702)),
        ("relu", GateForm("relu")),
        ("relu2", GateForm("relu2")),
        ("tanh", None),
        ("relu6", None),
        ("mish", None),
        ("gelu_10", None),
    ],
)
def test_activations(name: str, form: GateForm | None) -> None:
    module = experts_of("Qwen3MoeForCausalLM")
    module.act_fn = ACT2FN[name]
    assert form_of(module) == form


def test_a_clamp_without_a_number_is_not_guessed() -> None:
    module = experts_of("GptOssForCausalLM")
    module.limit = torch.tensor(7.0)
    assert form_of(module) is None


@pytest.mark.parametrize("bound", [0.5, 5.0, 300.0])
def test_a_clamp_that_no_attribute_names_is_not_guessed(bound: float) -> None:
    module = experts_of("Qwen3MoeForCausalLM")
    module._apply_gate = lambda product: (
        module.act_fn(product.chunk(2, -1)[0]).clamp(max=bound) * product.chunk(2, -1)[1]
    )
    assert form_of(module) is None


def test_code_that_fails_is_not_known() -> None:
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("other sizes")

    module = experts_of("Qwen3MoeForCausalLM")
    module._apply_gate = fail
    assert form_of(module) is None


def test_a_norm_after_the_experts_is_not_known() -> None:
    module = experts_of("Qwen3MoeForCausalLM")
    module.has_post_expert_norm = True
    assert form_of(module) is None


def test_weights_of_another_kind_are_not_known() -> None:
    module = experts_of("Qwen3MoeForCausalLM")
    usual = module.down_proj
    for other in (
        nn.Parameter(usual.detach().double()),
        nn.Parameter(usual.detach().transpose(1, 2).contiguous()),
        nn.Parameter(usual.detach()[:-1]),
    ):
        module.down_proj = other
        assert form_of(module) is None
    del module.down_proj
    module.register_buffer("down_proj", usual.detach())
    assert form_of(module) is None


def test_weights_that_show_another_dtype_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_tensor, "_SMALL", 0)
    module = experts_of("Qwen3MoeForCausalLM").bfloat16()
    assert form_of(module) is not None
    wide_tensor.widen_weights(module, torch.float32)
    assert form_of(module) is None


def test_random_numbers_are_not_drawn() -> None:
    module = experts_of("Qwen3MoeForCausalLM")
    before = torch.random.get_rng_state()
    form_of(module)
    assert torch.random.get_rng_state().equal(before)


def test_other_modules_do_not_dispatch() -> None:
    model = tiny_model("Qwen3MoeForCausalLM")
    names = {type(module).__name__ for module in model.modules() if dispatches(module)}
    assert names == {"Qwen3MoeExperts"}


@pytest.mark.parametrize("class_name", ["Qwen3MoeForCausalLM", "GptOssForCausalLM", "MixtralForCausalLM"])
def test_bytes_that_a_token_is_not_multiplied_with(class_name: str) -> None:
    model = tiny_model(class_name)
    layers: list[Any] = [module for module in model.modules() if dispatches(module)]
    experts, choices = layers[0].num_experts, choices_of(layers[0])
    assert 1 < choices < experts
    held = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
    assert idle_bytes(model) == pytest.approx(held * (experts - choices) / experts, abs=1)
    assert idle_bytes(tiny_model("LlamaForCausalLM")) == 0
    layers[0].num_experts = None
    assert idle_bytes(model) == pytest.approx(held * (experts - choices) / experts * (1 - 1 / len(layers)), abs=1)
