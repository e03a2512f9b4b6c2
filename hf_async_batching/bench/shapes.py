"""Shapes of real models by name, with random weights: speed depends on shapes, not on what a model has learnt."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel


class Shape(NamedTuple):
    """A class of config by name, and its fields."""

    config: str
    fields: dict[str, Any]


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _qwen3_rope() -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1_000_000.0}


# The fields are those of each model's public config.json.
SHAPES: dict[str, Shape] = {
    "llama-3.1-8b": Shape(
        "LlamaConfig",
        {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _llama3_rope(8.0),
            "tie_word_embeddings": False,
        },
    ),
    "llama-3.2-1b": Shape(
        "LlamaConfig",
        {
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _llama3_rope(32.0),
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-0.6b": Shape(
        "Qwen3Config",
        {
            "vocab_size": 151_936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _qwen3_rope(),
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-8b": Shape(
        "Qwen3Config",
        {
            "vocab_size": 151_936,
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _qwen3_rope(),
            "tie_word_embeddings": False,
        },
    ),
    "smollm2-135m": Shape(
        "LlamaConfig",
        {
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
            "tie_word_embeddings": True,
        },
    ),
    # For tests: large weights, so that greedy outputs do not settle into one token.
    "tiny": Shape(
        "LlamaConfig",
        {
            "vocab_size": 211,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16_384,
            "initializer_range": 0.3,
            "tie_word_embeddings": False,
        },
    ),
}


def random_model(
    shape: str, device: torch.device, dtype: torch.dtype, *, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A model of `shape` in evaluation mode whose weights are drawn on `device`; nothing ends its completions.

    Args:
        shape: A key of `SHAPES`.
        device: Where the weights are made and stay.
        dtype: Of the weights.
        seed: Of the weights. The state of torch's own generators is the same before and after.
        changes: Fields of the config that differ from the shape's, such as `num_hidden_layers`.

    Raises:
        ValueError: No such shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"there is no shape {shape!r}; choose one of {', '.join(SHAPES)}")
    config_class: Any = getattr(transformers, SHAPES[shape].config)
    # No token means anything here: one that ends a completion would only make runs shorter at random.
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = config_class(**{**SHAPES[shape].fields, **special, **changes})
    # `manual_seed` seeds every GPU, so the state of every GPU is kept.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), device:
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    made: PreTrainedModel = model.eval()
    return made
