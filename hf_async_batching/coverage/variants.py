"""Tiny configs for features that real checkpoints of a class have beyond its config's defaults.

The defaults of many config classes describe only the first checkpoint. A variant is named after the class and the
difference: `Phi3ForCausalLM+longrope`.
"""

from __future__ import annotations

from typing import Any

from hf_async_batching.model.small.tiny_configs import WINDOW

# Frequencies are scaled from this few tokens on, so that the check's prompts cross the length before and while
# decoding.
ORIGINAL = 32
_THETA = 1e4
_SWA, _FULL = "sliding_attention", "full_attention"


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": _THETA, **fields}


_LINEAR = _rope("linear", factor=8.0)
_DYNAMIC = _rope("dynamic", factor=4.0, original_max_position_embeddings=ORIGINAL)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL)
_LLAMA3 = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=ORIGINAL
)


def _longrope(rotary: int, **fields: Any) -> dict[str, Any]:
    """LongRoPE for heads with `rotary` rotated dimensions."""
    half = rotary // 2
    factors = {
        "short_factor": [1.0 + 0.1 * i for i in range(half)],
        "long_factor": [1.5 + 0.5 * i for i in range(half)],
    }
    return _rope("longrope", **factors, original_max_position_embeddings=ORIGINAL, factor=16.0, **fields)


_PHI3 = {"original_max_position_embeddings": ORIGINAL, "rope_parameters": _longrope(16, partial_rotary_factor=1.0)}
_PHI4 = {"original_max_position_embeddings": ORIGINAL, "rope_parameters": _longrope(12, partial_rotary_factor=0.75)}
_MIXED = {"layer_types": [_SWA, _FULL] * 2}

VARIANTS: dict[str, dict[str, Any]] = {
    "CohereForCausalLM+qk_norm": {"use_qk_norm": True},
    "DeepseekV3ForCausalLM+no_q_lora": {"q_lora_rank": None},
    "DeepseekV3ForCausalLM+yarn": {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "DeepseekV32ForCausalLM+yarn": {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "DogeForCausalLM+experts": {"is_moe": True, "num_experts": 4},
    "FalconForCausalLM+alibi": {"alibi": True, "multi_query": False, "parallel_attn": False, "num_kv_heads": 4},
    "FalconForCausalLM+new_decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "Gemma3ForCausalLM+dynamic": {"rope_parameters": {_SWA: _rope("default"), _FULL: _DYNAMIC}, **_MIXED},
    "Gemma3ForCausalLM+linear": {"rope_parameters": {_SWA: _rope("default"), _FULL: _LINEAR}, **_MIXED},
    "Gemma4ForCausalLM+experts": {
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32,
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
    },
    "Gemma4ForCausalLM+keys_are_values": {
        "attention_k_eq_v": True, "num_global_key_value_heads": 2, "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
    "GraniteMoeHybridForCausalLM+rope": {"position_embedding_type": "rope"},
    "LagunaForCausalLM+yarn": {"rope_parameters": {_SWA: _rope("default"), _FULL: _YARN}},
    "LlamaForCausalLM+dynamic": {"rope_parameters": _DYNAMIC},
    "LlamaForCausalLM+linear": {"rope_parameters": _LINEAR},
    "LlamaForCausalLM+llama3": {"rope_parameters": _LLAMA3},
    "LlamaForCausalLM+yarn": {"rope_parameters": _YARN},
    "MiniCPM3ForCausalLM+longrope": {"rope_parameters": _longrope(8)},
    "MixtralForCausalLM+window": {"sliding_window": WINDOW},
    "MptForCausalLM+clip_and_qk_norm": {"attn_config": {"clip_qkv": 6.0, "qk_ln": True, "alibi": True}},
    "Olmo3ForCausalLM+yarn": {"rope_parameters": {_SWA: _rope("default"), _FULL: _YARN}},
    "OlmoForCausalLM+clip": {"clip_qkv": 4.0},
    "OPTForCausalLM+projections": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "Phi3ForCausalLM+longrope": _PHI3,
    "Phi3ForCausalLM+longrope_partial": _PHI4,
    "Phi4MultimodalForCausalLM+longrope": _PHI4,
    "PhiForCausalLM+qk_norm": {"qk_layernorm": True},
    "PhimoeForCausalLM+longrope": {
        "rope_parameters": _longrope(16, short_mscale=1.1, long_mscale=1.2),
        "original_max_position_embeddings": ORIGINAL,
    },
    "Qwen2ForCausalLM+window": {
        "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2,
        "layer_types": [_FULL, _FULL, _SWA, _SWA],
    },
    "Qwen3ForCausalLM+yarn": {"rope_parameters": _YARN},
    "Qwen3MoeForCausalLM+window": {"use_sliding_window": True, "sliding_window": WINDOW},
    "SmolLM3ForCausalLM+window": {
        "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": [_SWA, _SWA, _SWA, _FULL]
    },
    "StableLmForCausalLM+parallel": {"qk_layernorm": True, "use_parallel_residual": True},
    "Zamba2ForCausalLM+rope": {"use_mem_rope": True, "use_shared_attention_adapter": True, "num_mem_blocks": 2},
}  # fmt: skip
"""Config fields that differ from the defaults, by class and name of the variant."""
