"""Tiny configs of any family: the sizes of a config class made small, whatever their fields are called.

Generic rules, which go by field names, are enough for most families. The others have an entry in `FAMILIES`.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedConfig

VOCAB = 193
LAYERS = 4
# Shorter than the check's prompts, so that prompts cross the ends of windows and chunks.
WINDOW = 16

FIELDS: dict[str, Any] = {
    # widths
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64, "dim_model": 64, "emb_dim": 64, "embedding_size": 64,
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "dff": 96, "dim_ff": 96, "feed_forward_size": 96,
    "ffn_hidden_size": 96, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "d_inner": 96, "ffn_intermediate_size": 96,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 32, "shared_intermediate_size": 32, "intermediate_size_mlp": 96,
    "ffn_expert_hidden_size": 32, "dense_intermediate_size": 96, "prefix_dense_intermediate_size": 96,
    "moe_latent_size": 32, "expert_intermediate_size": 32, "zaya_mlp_expansion": 32,
    # depths
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS,
    "decoder_layers": LAYERS, "encoder_layers": LAYERS, "num_decoder_layers": LAYERS, "num_encoder_layers": LAYERS,
    "num_mtp_layers": 0, "num_nextn_predict_layers": 0,
    # heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4, "num_heads": 4, "swa_num_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "multi_query_group_num": 2, "swa_num_key_value_heads": 2,
    "head_dim": 16, "kv_channels": 16, "attention_head_dim": 16, "d_kv": 16, "dim_head": 16, "swa_head_dim": 16,
    "attention_head_size": 16, "global_head_dim": 16, "v_head_dim": 16, "swa_v_head_dim": 16,
    "rotary_dim": 8,
    # MLA; keys and values differ in size
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "o_lora_rank": 16,
    "qk_head_dim": 24, "index_head_dim": 16, "index_n_heads": 2, "q_a_proj_dim": 24,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "moe_top_k": 2, "top_k_experts": 2, "num_selected_experts": 2,
    "n_shared_experts": 1, "moe_num_shared_experts": 1, "num_shared_experts": 1, "n_group": 2, "topk_group": 1,
    "num_expert_group": 2, "zero_expert_num": 2, "expert_num": 4, "moe_num_experts_per_tok": 2,
    # state spaces, convolutions and linear attention
    "state_size": 8, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_n_heads": 8, "mamba_n_groups": 2,
    "mamba_expand": 2, "mamba_d_conv": 4, "conv_kernel": 4, "mamba_chunk_size": 8, "chunk_size": 8, "n_groups": 2,
    "mamba_dt_rank": 8, "time_step_rank": 8, "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_d_ssm": 128,
    "ssm_state_size": 8, "mamba_headdim": 16, "mamba_ngroups": 2, "lru_width": 64, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_head_dim": 16, "linear_num_heads": 4,
    "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4,
    "n_mamba_heads": 2, "attention_hidden_size": 64, "adapter_rank": 8, "num_mem_blocks": 1,
    # windows and lengths
    "attention_chunk_size": WINDOW, "attention_window_size": WINDOW, "sliding_window": WINDOW, "window_size": WINDOW,
    "keep_window_size": WINDOW, "sliding_window_size": WINDOW, "rel_extent": WINDOW, "index_topk": WINDOW,
    "index_block_size": 8, "index_topk_blocks": 2, "block_size": 8, "max_inference_chunksize": WINDOW,
    "local_attn_chunk_length": WINDOW, "lsh_attn_chunk_length": WINDOW, "floor_scale": 8, "log_scaling_n_floor": 8,
    "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "max_seq_len": 512, "context_length": 512,
    "seq_length": 512, "max_sequence_length": 512, "max_target_positions": 512, "max_source_positions": 64,
    # vocabularies
    "vocab_size": VOCAB, "n_vocab": VOCAB, "unpadded_vocab_size": VOCAB,
    "decoder_vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8, "vocab_size_or_config_json_file": VOCAB, "text_vocab_size": VOCAB,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1,
    # a model with tied output embeddings tends to repeat its input
    "tie_word_embeddings": False,
    "is_decoder": True,
}  # fmt: skip

# Left unset if the family leaves them unset by default.
_ONLY_IF_SET = {"sliding_window", "attention_chunk_size", "q_lora_rank", "head_dim", "n_shared_experts", "v_head_dim"}
_ONLY_IF_SET |= {"num_key_value_heads", "n_group", "topk_group", "intermediate_size", "n_inner", "moe_latent_size"}
_ONLY_IF_SET |= {"num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size", "global_head_dim"}
_ONLY_IF_SET |= {"hidden_size_per_layer_input", "q_a_proj_dim", "adapter_rank", "swa_num_attention_heads"}


def tiny_config(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """Return a config of `config_class` with tiny sizes.

    Args:
        config_class: Config class of any family.
        changes: Fields to set to other values.

    Raises:
        Exception: Any error of the class if the sizes do not fit together.
    """
    special = FAMILIES.get(config_class.model_type, {})
    default = config_class()
    fields: dict[str, Any] = {"num_key_value_heads": 4} if hasattr(default, "qk_rope_head_dim") else {}
    names = set(default.to_dict()) | set(getattr(config_class, "attribute_map", {}))
    names |= set(inspect.signature(config_class.__init__).parameters)
    for name, value in FIELDS.items():
        if name not in names or name in default.attribute_map:
            continue
        before = default.to_dict().get(name)
        if before is None and name in _ONLY_IF_SET:
            continue
        if isinstance(before, int) and 0 <= before < value and not isinstance(before, bool) and "token_id" not in name:
            continue  # already smaller
        if "qk_rope_head_dim" in names and name in ("head_dim", "num_key_value_heads"):
            continue  # multi-head latent attention derives the head size, and has one key-value head per query head
        if isinstance(before, (list, tuple)):
            continue
        fields[name] = value
    rope = default.to_dict().get("rope_parameters")
    if isinstance(rope, dict):
        fields["rope_parameters"] = _short_rope(rope)
    layers = special.get("num_hidden_layers", LAYERS)
    for name, value in default.to_dict().items():
        if isinstance(value, list) and value and isinstance(value[0], str) and len(value) > layers:
            fields[name] = _mixed(value, layers)
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig) and value.model_type:
            fields[name] = tiny_config(type(value))
    return config_class(**{**fields, **special, **changes})


def _short_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters that scale from a few tokens on."""
    lengths = {
        "original_max_position_embeddings": WINDOW,
        "max_position_embeddings": FIELDS["max_position_embeddings"],
    }
    return {
        name: _short_rope(value) if isinstance(value, dict) else lengths.get(name, value)
        for name, value in rope.items()
    }


def _mixed(kinds: list[str], count: int) -> list[str]:
    """`count` layer types that include each of `kinds`, as far as they fit."""
    distinct = list(dict.fromkeys(kinds))
    return (distinct * count)[:count]


_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}

# model_type -> fields that the generic rules get wrong.
FAMILIES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_experts_per_tok": 2, "num_experts_per_token": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": LAYERS},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": None},
    },
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "cohere2_moe": {"num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"] * 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"first_k_dense_replace": 1},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 64,
        "o_groups": 2,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "dots1": {
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "dots3_note": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "head_dim": 24,
        "sliding_window": WINDOW,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    # A layer and its MLP count as two layers.
    "dory": {
        "num_hidden_layers": 8,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2,
        "n_input_layers": 2,
        "n_recurrent_layers": 4,
        "n_output_layers": 2,
    },
    "falcon_h1": {
        "mamba_n_groups": 2,
        "mamba_rms_norm": True,
        "key_multiplier": 0.5,
        "attention_out_multiplier": 0.9,
        "ssm_multipliers": [0.7, 0.8, 0.9, 1.1, 1.2],
        "ssm_out_multiplier": 0.8,
    },
    "gemma3n_text": {"num_kv_shared_layers": 2, "laurel_rank": 8, "intermediate_size": 96},
    "gemma4_text": {"num_kv_shared_layers": 2, "head_dim": 16},
    "gemma4_unified_text": {"head_dim": 16},
    "glm4_moe": {"use_qk_norm": True, "n_group": 2},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_groups": 2, **_GRANITE},
    "granitemoeshared": {"shared_intermediate_size": 32, **_GRANITE},
    "granitemoe_swa": {"shared_intermediate_size": 32, **_GRANITE},
    "granite_swa": _GRANITE,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_experts_per_tok": 2, "num_experts_per_token": 2},
    "laguna": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "num_attention_heads_per_layer": [4, 8, 4, 8],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "ministral": {"head_dim": 16, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "mistral4": {"qk_nope_head_dim": 8, "first_k_dense_replace": 1},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 16,
        "ngram_vocab_size_base": 100,
    },
    "reformer": {
        "axial_pos_shape": (16, 32),
        "axial_pos_embds_dim": (16, 48),
        "attn_layers": ["local", "lsh"] * 2,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "starcoder2": {"sliding_window": WINDOW},
    "xlm": {"causal": True, "is_encoder": True, "is_decoder": False},
    "xlstm": {"hidden_size": 128, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
        "mamba_ngroups": 2,
    },
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"] * 2, "sliding_window": WINDOW},
}
