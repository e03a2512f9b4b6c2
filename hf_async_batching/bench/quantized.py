"""Random models whose linear layers are quantized, as `from_pretrained` with a `quantization_config` leaves them."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Make the settings of 4-bit NormalFloat weights. Layers compute in `dtype`; scales are not quantized.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("nf4 weights need bitsandbytes: pip install bitsandbytes")
    make: Any = BitsAndBytesConfig
    config: BitsAndBytesConfig = make(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return config


def nf4_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Make a model with random weights whose `nn.Linear` layers are `bitsandbytes` `Linear4bit`.

    The weights are drawn one layer at a time, so that memory never holds more than one layer in `dtype`. The output
    layer stays in `dtype`, as in transformers, and so do experts whose weights are one tensor.

    Args:
        config: The model's config.
        device: The device of the weights; torch's default generator draws them there.
        dtype: Dtype of the weights that are not quantized; quantized layers compute in it.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    quantizer: Any = AutoHfQuantizer.from_config(nf4_config(dtype), pre_quantized=False)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    quantizer.preprocess_model(model=model, device_map=None)
    scale: float = getattr(config, "initializer_range", None) or 0.02
    made: dict[int, torch.Tensor] = {}  # tied parameters stay tied
    drawn: list[Any] = []
    for module in model.modules():
        if hasattr(module, "quant_state"):
            _draw(module, scale, device, dtype)
            drawn.append(module)
        else:
            allocate(module, made, device)
    model.initialize_weights()
    for module in drawn:
        del module.weight._is_hf_initialized
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    finished: PreTrainedModel = model
    return finished


def _draw(module: Any, scale: float, device: torch.device, dtype: torch.dtype) -> None:
    """Draw the weights of a `Linear4bit` that is on the meta device."""
    old = module.weight
    weight = torch.empty(old.shape, dtype=dtype, device=device).normal_(std=scale)
    module.weight = type(old)(weight, requires_grad=False, **vars(old)).to(device)
    if module.bias is not None:
        module.bias = nn.Parameter(torch.zeros(module.bias.shape, dtype=dtype, device=device), requires_grad=False)
    # `initialize_weights` skips these modules, even if a layer around them draws some of its parts again.
    module._is_hf_initialized = module.weight._is_hf_initialized = True


def allocate(module: nn.Module, made: dict[int, torch.Tensor], device: torch.device) -> None:
    """Allocate a module's own parameters and buffers without values."""
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is None or not tensor.is_meta:
                continue
            if id(tensor) not in made:
                memory = torch.empty_like(tensor, device=device)
                if isinstance(tensor, nn.Parameter):
                    memory = nn.Parameter(memory, requires_grad=tensor.requires_grad)
                made[id(tensor)] = memory
            tensors[name] = made[id(tensor)]  # type: ignore[assignment]
