"""The forms of quantized weights that have kernels, by name; and how their layers are recognised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from hf_async_batching.linear.quantized import bitsandbytes_form, fp8_form, word_form
from hf_async_batching.linear.quantized.form import Form
from hf_async_batching.linear.quantized.weight import QuantizedWeight

FORMS: dict[str, Form] = {
    "nf4": bitsandbytes_form.BitsAndBytes4("nf4"),
    "fp4": bitsandbytes_form.BitsAndBytes4("fp4"),
    "fp8 blocks": fp8_form.Fp8Blocks(),
    "gptq int4": word_form.Int4Words(along_inputs=True),
    "awq int4": word_form.Int4Words(along_inputs=False),
}

ON_CUDA = ("nf4", "fp4")
"""Forms whose kernels were compared with the reference on a card; layers of others keep their own forward there."""

# By the module and the name of a layer's class: importing these packages takes seconds.
_READERS: dict[tuple[str, str], Callable[[Any], QuantizedWeight | None]] = {
    ("bitsandbytes.nn.modules", "Linear4bit"): bitsandbytes_form.weight_of,
    ("bitsandbytes.nn.modules", "LinearNF4"): bitsandbytes_form.weight_of,
    ("bitsandbytes.nn.modules", "LinearFP4"): bitsandbytes_form.weight_of,
    ("transformers.integrations.finegrained_fp8", "FP8Linear"): fp8_form.weight_of,
    ("gptqmodel.nn_modules.qlinear.torch", "TorchLinear"): word_form.gptq_weight_of,
    ("gptqmodel.nn_modules.qlinear.tritonv2", "TritonV2Linear"): word_form.gptq_weight_of,
    ("gptqmodel.nn_modules.qlinear.torch_awq", "AwqTorchLinear"): word_form.awq_weight_of,
    ("gptqmodel.nn_modules.qlinear.gemm_awq", "AwqGEMMLinear"): word_form.awq_weight_of,
    ("gptqmodel.nn_modules.qlinear.gemm_awq_triton", "AwqGEMMTritonLinear"): word_form.awq_weight_of,
}


def recognise(module: nn.Module) -> QuantizedWeight | None:
    """The quantized weight of a linear layer that our products can compute; None for all other modules."""
    kind = type(module)
    reader = _READERS.get((kind.__module__, kind.__name__))
    if reader is None or "forward" in vars(module) or module._forward_pre_hooks or module._forward_hooks:
        return None
    weight = reader(module)
    return None if weight is not None and weight.packed.is_cuda and weight.form not in ON_CUDA else weight
