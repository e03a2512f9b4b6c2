"""A random gpt-oss whose experts are MXFP4, as `from_pretrained` with `keep_mxfp4` leaves it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_async_batching.bench.quantized import allocate
from hf_async_batching.experts.mxfp4_model import Mxfp4Experts, Mxfp4InPlaceConfig, Mxfp4InPlaceQuantizer

# With all nibbles alike, the weights' deviation is 0.02 to 0.03, as most configs ask for.
_SCALES = 118, 122


def mxfp4_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Make a model with random weights whose experts are random bytes; plain ones are never made.

    Args:
        config: A config of gpt-oss.
        device: The device of the weights; torch's default generator draws them there.
        dtype: Dtype of all other weights.

    Raises:
        ValueError: The model has no experts of gpt-oss.
    """
    quantizer: Any = Mxfp4InPlaceQuantizer(Mxfp4InPlaceConfig(), pre_quantized=True)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        quantizer.preprocess_model(model=model)
    made: dict[int, torch.Tensor] = {}  # tied parameters stay tied
    packed: list[Any] = []
    for module in model.modules():
        allocate(module, made, device)
        if isinstance(module, Mxfp4Experts):
            _draw(module)
            packed.append(module)
    model.initialize_weights()
    for one in packed:
        for tensor in one._parameters.values():
            del tensor._is_hf_initialized
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    finished: PreTrainedModel = model
    return finished


def _draw(module: Any) -> None:
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            getattr(module, f"{name}_blocks").random_(0, 256)
            getattr(module, f"{name}_scales").random_(*_SCALES)
            getattr(module, f"{name}_bias").zero_()
    # `initialize_weights` skips these modules, even if a layer around them draws some of its parts again.
    module._is_hf_initialized = True
    for tensor in module._parameters.values():
        tensor._is_hf_initialized = True
