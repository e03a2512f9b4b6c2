"""Random models whose linear layers are quantized, as `from_pretrained` with a `quantization_config` leaves them."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import AutoHfQuantizer

_FP8_BLOCK = 128


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """Make the settings of a kind of quantized layers.

    Args:
        kind: "nf4" for 4-bit NormalFloat weights, whose scales are not quantized; "fp8" for 8-bit floats with a scale
            for each block of 128 x 128, where each forward quantizes activations, too.
        dtype: Dtype in which 4-bit layers compute.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    make: Any
    if kind == "fp8":
        make = FineGrainedFP8Config
        return make(weight_block_size=(_FP8_BLOCK, _FP8_BLOCK))
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("nf4 weights need bitsandbytes: pip install bitsandbytes")
    make = BitsAndBytesConfig
    return make(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def quantized_model(kind: str, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Make a model with random weights whose `nn.Linear` layers are quantized.

    The weights are drawn one layer at a time, so that memory never holds more than one layer in `dtype`. The output
    layer stays in `dtype`, as in transformers, and so do experts whose weights are one tensor.

    Args:
        kind: As in `quantization_config`.
        config: The model's config.
        device: The device of the weights; torch's default generator draws them there.
        dtype: Dtype of the weights that are not quantized; quantized layers compute in it.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    # A checkpoint of 8-bit floats holds them; 4-bit weights are made from others.
    quantizer: Any = AutoHfQuantizer.from_config(quantization_config(kind, dtype), pre_quantized=kind == "fp8")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    quantizer.preprocess_model(model=model, device_map=None)
    scale: float = getattr(config, "initializer_range", None) or 0.02
    made: dict[int, torch.Tensor] = {}  # tied parameters stay tied
    drawn: list[Any] = []
    for module in model.modules():
        if hasattr(module, "quant_state"):
            _draw_4bit(module, scale, device, dtype)
            drawn.append(module)
        elif type(module).__name__ == "FP8Linear":
            _draw_fp8(module, scale, device, dtype)
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


def _draw_4bit(module: Any, scale: float, device: torch.device, dtype: torch.dtype) -> None:
    """Draw the weights of a `Linear4bit` that is on the meta device."""
    old = module.weight
    weight = torch.empty(old.shape, dtype=dtype, device=device).normal_(std=scale)
    module.weight = type(old)(weight, requires_grad=False, **vars(old)).to(device)
    _zero_bias(module, device, dtype)


def _draw_fp8(module: Any, scale: float, device: torch.device, dtype: torch.dtype) -> None:
    """Draw the weights of an `FP8Linear` that is on the meta device."""
    weight = torch.empty(module.weight.shape, dtype=dtype, device=device).normal_()
    module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
    # Blocks of one scale would hide a product that takes another block's.
    scales = torch.empty(module.weight_scale_inv.shape, device=device).uniform_(0.5 * scale, 1.5 * scale)
    module.weight_scale_inv = nn.Parameter(scales, requires_grad=False)
    _zero_bias(module, device, dtype)


def _zero_bias(module: Any, device: torch.device, dtype: torch.dtype) -> None:
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
