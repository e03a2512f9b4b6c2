"""Families whose tokens reach each other outside of attention are never packed, in any dtype."""

from __future__ import annotations

import logging

import pytest
import torch
from support.hidden_states import hide_functions

from hf_async_batching import BatchingConfig, GenerationManager, UnsupportedModelError
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.forward.recurrence_probe import refuse_mixing

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("class_name", ["RecurrentGemmaForCausalLM", "ZayaForCausalLM"])
def test_states_are_not_packed(class_name: str, dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{class_name} is not served: its? "):
        PackedForward(tiny_model(class_name).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("class_name", ["FalconH1ForCausalLM", "NemotronHForCausalLM", "Qwen3_5ForCausalLM"])
def test_states_that_are_not_recognised_are_not_packed(
    class_name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FalconH1's logits over packed tokens are wrong by less than bfloat16 rounds."""
    assert PackedForward(tiny_model(class_name).to(dtype)).states
    hide_functions(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=f"{class_name} is not served: its? "):
        PackedForward(tiny_model(class_name).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("FalconH1ForCausalLM", "causal_conv1d_fn"),
        ("FalconH1ForCausalLM", "mamba2_chunk_scan"),
        ("NemotronHForCausalLM", "mamba2_chunk_scan"),
        ("JambaForCausalLM", "mamba_selective_scan"),
        ("Qwen3_5ForCausalLM", "torch_chunk_gated_delta_rule"),
        ("KimiLinearForCausalLM", "chunk_kimi_delta_attention"),
    ],
)
def test_a_layer_of_which_one_function_is_unknown_is_not_packed(
    class_name: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known of such a layer must not vouch for the rest; a scan can change less than bfloat16 rounds."""
    hide_functions(monkeypatch, name)
    with pytest.raises(UnsupportedModelError, match=f"{class_name} is not served: its? "):
        PackedForward(tiny_model(class_name).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "GPT2LMHeadModel"])
def test_families_with_attention_alone_are(class_name: str, dtype: torch.dtype) -> None:
    assert PackedForward(tiny_model(class_name).to(dtype)).layers


def test_a_convolution_that_no_config_tells_of_is_seen() -> None:
    model = tiny_model("LlamaForCausalLM")
    inner = model.model.layers[1].mlp

    class Shifted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.inner(x + 0.01 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])
            return out

    model.model.layers[1].mlp = Shifted()
    with pytest.raises(UnsupportedModelError, match="outside of attention"):
        PackedForward(model)


def test_rounding_is_no_mixing() -> None:
    weight = torch.randn(50, 8)

    def run(tokens: torch.Tensor) -> torch.Tensor:
        return weight[tokens] + 1e-6 * tokens.sum()

    refuse_mixing(run, torch.arange(1, 4), 50)
    with pytest.raises(UnsupportedModelError, match="outside of attention"):
        refuse_mixing(lambda tokens: weight[tokens] + 1e-2 * tokens.sum(), torch.arange(1, 4), 50)


def test_tokens_that_only_fill_a_vocabulary_up_hide_no_mixing() -> None:
    weight = torch.randn(50, 8)
    weight[:, 5:] = -torch.inf
    refuse_mixing(lambda tokens: weight[tokens], torch.arange(1, 4), 50)
    with pytest.raises(UnsupportedModelError, match="outside of attention"):
        refuse_mixing(lambda tokens: weight[tokens] + 1e-2 * tokens.sum(), torch.arange(1, 4), 50)


@pytest.mark.parametrize("class_name", ["BartForCausalLM", "FalconH1ForCausalLM", "ZayaForCausalLM"])
def test_routes_are_the_same_in_bfloat16(class_name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A family that knows no padding must not be taken for one that does because rounding hides it."""
    routes = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(class_name).to(dtype)
        manager = GenerationManager(model, BatchingConfig(page_size=16))
        with caplog.at_level(logging.DEBUG, "hf_async_batching"), manager:
            manager.submit([5, 6, 7], max_new_tokens=2, do_sample=False).result(60)
            assert manager.assembly is not None
            routes.append(manager.assembly.forward.route)
    assert routes[0] == routes[1], caplog.text
