"""Layers that expand latents are recognised by their values, and keep latents in pages with `generate`'s tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_async_batching import BatchingConfig, GenerationManager, per_token
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.model.forward.packed_forward import PackedForward

SMALL = BatchingConfig(max_rows=4, page_size=16, num_pages=9, max_batch_tokens=24, depth=2, debug=True)
FAMILIES = [
    "DeepseekV3ForCausalLM",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("DeepseekV2ForCausalLM", "MiniCPM3ForCausalLM", "Glm4MoeLiteForCausalLM", "YoutuForCausalLM")
    ),
]


def expansions(forward: PackedForward) -> list[nn.Linear]:
    return [one.expansion for one in forward._latents]


@pytest.mark.parametrize("class_name", FAMILIES)
def test_tokens_equal_those_of_generate(class_name: str) -> None:
    """Chunked prompts, late joins, pages that run out, and a prompt whose pages are found."""
    model = tiny_model(class_name)
    torch.manual_seed(0)
    prompts = [torch.randint(3, 90, (length,)).tolist() for length in (1, 9, 40, 25, 60, 5)]
    prompts.append([*prompts[4][:50], 7, 8])
    want = [model.generate(torch.tensor([one]), max_new_tokens=12, do_sample=False)[0, len(one) :] for one in prompts]
    with GenerationManager(model, SMALL) as manager:
        handles = [
            manager.submit(one, max_new_tokens=12, generation_config=model.generation_config) for one in prompts
        ]
        got = [handle.result() for handle in handles]
        forward: Any = manager.assembly.forward  # type: ignore[union-attr]
        assert forward.latent_layers == len(forward.layers) > 0
    assert [one.token_ids for one in got] == [one.tolist() for one in want]


def test_pages_hold_latents_and_the_rotary_part() -> None:
    model = tiny_model("DeepseekV3ForCausalLM")
    config, forward = model.config, PackedForward(model)
    kept = config.kv_lora_rank + config.qk_rope_head_dim
    expanded = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    assert {layer.bytes_per_token for layer in forward.layers} == {4 * kept}
    plain = PackedForward(model, latents=False)
    assert plain.latent_layers == 0
    assert {layer.bytes_per_token for layer in plain.layers} == {4 * expanded}
    assert kept < expanded


def test_the_users_model_stays_as_it_is() -> None:
    model = tiny_model("DeepseekV3ForCausalLM")
    kinds = [type(module) for module in model.modules()]
    forward = PackedForward(model)
    assert len(expansions(forward)) == model.config.num_hidden_layers
    assert [type(module) for module in model.modules()] == kinds
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(one.weight.data_ptr() in shared for one in expansions(forward)), "no copy of the weights"


def expansion_of(model: nn.Module) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith("layers.1.self_attn"))


def with_bias(model: nn.Module) -> None:
    linear = expansion_of(model).kv_b_proj
    linear.bias = nn.Parameter(torch.zeros(linear.out_features))


def of_another_class(model: nn.Module) -> None:
    expansion_of(model).kv_b_proj.__class__ = type("Adapted", (nn.Linear,), {})


def with_a_hook(model: nn.Module) -> None:
    expansion_of(model).kv_b_proj.register_forward_hook(per_token(lambda module, inputs, output: output * 2))


@pytest.mark.parametrize("change", [with_bias, of_another_class, with_a_hook])
def test_another_expansion_stays_expanded(change: Any) -> None:
    model = tiny_model("DeepseekV3ForCausalLM")
    before = PackedForward(model).latent_layers
    change(model)
    assert PackedForward(model).latent_layers == before - 1


def test_other_attention_keeps_its_pages() -> None:
    for class_name in ("LlamaForCausalLM", "Gemma2ForCausalLM"):
        assert PackedForward(tiny_model(class_name)).latent_layers == 0


def test_settings_and_failures_expand(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_async_batching.attention import latents
    from hf_async_batching.engine.route import choose_route

    model = tiny_model("DeepseekV3ForCausalLM")
    forward: Any = choose_route(model, BatchingConfig(latent_pages=False)).forward
    assert forward.latent_layers == 0
    wrong = latents.multiply_by_heads

    def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return wrong(x, weight) * 1.1

    from hf_async_batching.attention import torch_backend

    monkeypatch.setattr(torch_backend, "multiply_by_heads", multiply)
    forward = choose_route(model, BatchingConfig()).forward
    assert isinstance(forward, PackedForward) and forward.latent_layers == 0
    assert "keeps expanded keys and values" in caplog.text


def test_models_without_latents_run_at_no_high_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some index what they keep by positions, which ends a CUDA context where nothing is kept."""
    highest: list[int] = []
    original = PackedForward._call

    def call(self: PackedForward, tokens: torch.Tensor, positions: torch.Tensor, *rest: Any) -> torch.Tensor:
        highest.append(int(positions.max()))
        return original(self, tokens, positions, *rest)

    monkeypatch.setattr(PackedForward, "_call", call)
    PackedForward(tiny_model("LlamaForCausalLM"))
    assert max(highest) < 64
    model = tiny_model("DeepseekV3ForCausalLM")
    PackedForward(model)
    assert max(highest) == model.config.max_position_embeddings - 1, "what depends on positions is seen"
