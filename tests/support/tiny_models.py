"""Tiny random models of many families, float32, deterministic."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB = 97
EOS = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

# Class of the config -> what differs from the common fields.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 16},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Phi3": {},
    "Gemma2": {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0},
    "Gemma3Text": {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32, "num_hidden_layers": 6},
    "Olmo2": {},
    "Granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "SmolLM3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "GPTNeoX": {"num_key_value_heads": None},
    "StableLm": {},
    "Qwen3Moe": {**_MOE, "head_dim": 32, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of `family` with random weights of a size at which greedy outputs do not settle into one token."""
    config_class = getattr(transformers, f"{family}Config")
    fields = {**_COMMON, **FAMILIES[family], **changes}
    config = config_class(**{name: value for name, value in fields.items() if value is not None})
    torch.manual_seed(sum(map(ord, family)) + seed)
    # Some releases of transformers drop Gemma-2's soft cap under sdpa, their default.
    attention = {"attn_implementation": "eager"} if family == "Gemma2" else {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0 if "embed" not in name else 1.0)
    return model


def ragged_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of 1 to `longest` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    lengths[0], lengths[-1] = 1, longest
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def greedy_alone(model: PreTrainedModel, prompt: list[int], max_new_tokens: int, **arguments: Any) -> list[int]:
    """New tokens of plain `model.generate` for one prompt alone."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, **arguments)
    return out[0, len(prompt) :].tolist()
