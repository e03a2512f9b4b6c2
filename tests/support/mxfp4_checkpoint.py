"""A small checkpoint of gpt-oss in MXFP4, laid out as the released ones are, and a packer that rounds its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_async_batching.coverage.families import tiny_model

_STEPS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round weights [..., inner] to MXFP4: uint8 blocks [..., inner / 32, 16] and scales [..., inner / 32]."""
    groups = weight.float().unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1)
    # The largest value of a group has the exponent of 4, the largest power of two among the steps.
    exponents = torch.where(largest > 0, largest.log2().floor() - 2, -127.0).clamp(-127, 1)
    steps = groups.abs() / torch.exp2(exponents)[..., None]
    nibbles = (steps[..., None] - _STEPS).abs().argmin(-1) + 8 * (groups < 0)
    return (nibbles[..., ::2] + 16 * nibbles[..., 1::2]).to(torch.uint8), (exponents + 127).to(torch.uint8)


def write_checkpoint(folder: Path, **changes: Any) -> None:
    """Write a tiny gpt-oss whose experts are MXFP4.

    Args:
        folder: Where to write; it exists.
        changes: Fields of the config.
    """
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_local_experts": 6,
        "num_hidden_layers": 2,
    }
    sizes |= {"layer_types": ["sliding_attention", "full_attention"], **changes}
    model = tiny_model("GptOssForCausalLM", **sizes)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            # transformers keeps [experts, inner, outputs]; the released tensors are [experts, outputs, inner].
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = pack(tensor.transpose(1, 2))
        else:
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
