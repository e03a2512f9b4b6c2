"""Shapes of the bench with small widths and few layers."""

from __future__ import annotations

from typing import Any

from hf_async_batching.bench.shapes import SHAPES

# Sizes of a model that runs in a moment, where the shape has the field.
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
}


def small(shape: str) -> dict[str, Any]:
    """The fields to change in a shape."""
    fields = SHAPES[shape].fields
    changes = {name: value for name, value in SMALL.items() if name in fields}
    if shape == "deepseek-v2-lite":
        changes["num_key_value_heads"] = 4
    if shape == "qwen3.5-9b":
        changes["rope_parameters"] = {**fields["rope_parameters"], "mrope_section": [1, 1, 0]}
    return {**changes, "num_hidden_layers": 3 if shape == "nemotron-h-8b" else 2}
