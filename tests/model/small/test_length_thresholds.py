"""The lengths beyond which a config makes a model compute otherwise, and small copies that have them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from hf_async_batching.model.small.length_thresholds import (
    SMALL,
    follows_length,
    length_thresholds,
    rope_dicts,
    scaled_down,
)

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize(
    ("config", "fields", "expected"),
    [
        ("Llama", {}, {}),
        ("Qwen3", {}, {}),
        ("Mistral", {"sliding_window": 1000}, {"sliding_window": 1000}),
        ("Mistral", {"sliding_window": None}, {}),
        ("Gemma3", {}, {"sliding_window": 4096}),
        ("GPTNeo", {}, {"window_size": 256}),
        ("Llama4Text", {}, {"attention_chunk_size": 8192, "floor_scale": 8192}),
        ("DeepseekV32", {}, {"index_topk": 2048}),
        ("DeepseekV4", {}, {
            "compress_rates.compressed_sparse_attention": 4, "compress_rates.heavily_compressed_attention": 128,
            "sliding_window": 128, "index_topk": 512,
        }),
        ("MiniMaxM3VL", {}, {"index_block_size": 128, "index_topk_blocks*index_block_size": 2048}),
        ("Mamba2", {}, {"chunk_size": 256}),
        ("Llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "rope_theta": 1e4, ORIGINAL: 8192}}, {}),
        ("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, ORIGINAL: 256}}, {}),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4},
            "max_position_embeddings": 300}, {f"rope_parameters.{ORIGINAL}": 300}),
        ("Phi3", {"rope_parameters": LONGROPE, ORIGINAL: 4096, "max_position_embeddings": 8192},
            {f"rope_parameters.{ORIGINAL}": 4096}),
        ("Ministral3", {}, {f"rope_parameters.{ORIGINAL}": 16384}),
        ("Gemma3Text", {"rope_parameters": {
            "full_attention": {**LONGROPE, ORIGINAL: 700},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            {"sliding_window": 4096, f"rope_parameters.full_attention.{ORIGINAL}": 700}),
    ],
)  # fmt: skip
def test_the_lengths_of_a_config(config: str, fields: dict[str, Any], expected: dict[str, int]) -> None:
    made = getattr(transformers, f"{config}Config")(**fields)
    assert length_thresholds(made) == expected


def test_rotary_parameters_by_layer_type() -> None:
    nested = transformers.Gemma3TextConfig(rope_parameters={
        "full_attention": {**LONGROPE, ORIGINAL: 700},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    })  # fmt: skip
    found = rope_dicts(nested)
    assert {kind: follows_length(rope) for kind, rope in found.items()} == {
        "full_attention": True,
        "sliding_attention": False,
    }
    assert list(rope_dicts(transformers.LlamaConfig())) == [""]


@pytest.mark.parametrize(
    "class_name",
    [
        "Llama4ForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM", "Gemma3ForConditionalGeneration",
        "Gemma4ForCausalLM", "GptOssForCausalLM", "DeepseekV32ForCausalLM", "MiniMaxM3VLForCausalLM",
        "GPTNeoForCausalLM", "Mamba2ForCausalLM", "FalconH1ForCausalLM", "Ministral3ForCausalLM", "Phi3ForCausalLM",
        "Qwen3NextForCausalLM", "Gemma3nForCausalLM",
    ],
)  # fmt: skip
def test_a_small_copy_generates_beyond_each_of_them(class_name: str) -> None:
    model_class = getattr(transformers, class_name)
    config = model_class.config_class()
    before = config.to_dict()
    small = scaled_down(config)
    assert config.to_dict() == before
    assert type(small) is type(config)
    lengths = length_thresholds(small)
    assert lengths.keys() == length_thresholds(config).keys()
    assert all(length <= SMALL for length in lengths.values())
    text, text_before = (each.get_text_config(decoder=True) for each in (small, config))
    for field in ("layer_types", "no_rope_layers", "attention_layers"):
        if getattr(text_before, field, None):
            assert set(getattr(text, field)) == set(getattr(text_before, field)), field
    model = model_class(small).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    prompt = torch.arange(3, 53)[None]
    out = model.generate(prompt, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 52)


def test_frequencies_that_follow_the_length_keep_theirs() -> None:
    """No batch goes beyond it; the factors fit the small heads."""
    fields = {"rope_parameters": dict(LONGROPE), ORIGINAL: 4096, "max_position_embeddings": 131072}
    small = scaled_down(transformers.Phi3Config(**fields))
    assert length_thresholds(small)[f"rope_parameters.{ORIGINAL}"] == 512
    assert len(small.rope_parameters["long_factor"]) == 8
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    small = scaled_down(transformers.LlamaConfig(rope_parameters=rope, max_position_embeddings=4096))
    assert length_thresholds(small) == {f"rope_parameters.{ORIGINAL}": 512}
    tiny = transformers.LlamaConfig(rope_parameters=rope, max_position_embeddings=20)
    assert length_thresholds(scaled_down(tiny)) == {f"rope_parameters.{ORIGINAL}": 512}, "beyond any prompt of a check"


def test_lengths_out_of_reach_stay_there() -> None:
    config = transformers.Llama4TextConfig(attention_chunk_size=1000, floor_scale=5000)
    assert length_thresholds(scaled_down(config, 5000)) == {"attention_chunk_size": SMALL, "floor_scale": 5000}
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "llama_4_scaling_beta": 0.1, ORIGINAL: 2000}
    config = transformers.Ministral3Config(rope_parameters=rope)
    assert length_thresholds(scaled_down(config, 2001)) == {f"rope_parameters.{ORIGINAL}": 8}
    assert length_thresholds(scaled_down(config, 2000)) == {f"rope_parameters.{ORIGINAL}": 512}


def test_heads_share_keys_as_before() -> None:
    def heads(**fields: int) -> tuple[int, int]:
        small = scaled_down(transformers.LlamaConfig(num_attention_heads=32, **fields))
        return small.num_attention_heads, small.num_key_value_heads

    assert heads(num_key_value_heads=32) == (4, 4)
    assert heads(num_key_value_heads=8) == (4, 2)
    assert heads(num_key_value_heads=1) == (4, 1)


def test_states_are_shared_by_groups_of_heads_as_before() -> None:
    for groups, expected in ((1, 1), (8, 2)):
        assert scaled_down(transformers.NemotronHConfig(n_groups=groups)).n_groups == expected


def test_layers_of_every_kind_are_kept() -> None:
    kinds = ["sliding_attention"] * 20 + ["full_attention"] * 2
    config = transformers.Gemma2Config(num_hidden_layers=22, layer_types=kinds)
    small = scaled_down(config)
    assert small.layer_types == ["sliding_attention", "full_attention"] and small.num_hidden_layers == 2
