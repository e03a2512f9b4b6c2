"""Recognise what a family's layer of experts computes, by its tensors and by its activation's values.

A class that dispatches through transformers' `ExpertsInterface` says how its weights lie. Its activation is a function
of its own, so that it is compared with each form that the kernels know. What equals none is not served.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_async_batching.experts.layer import GROUP, ExpertWeights, GateForm
from hf_async_batching.experts.mxfp4 import LARGEST_SCALE
from hf_async_batching.experts.mxfp4_model import Mxfp4Experts
from hf_async_batching.experts.reference import activate

_SIZE = 64
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
# SiLU, and "quick_gelu".
_ALPHAS = (1.0, 1.702)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dispatches(module: nn.Module) -> bool:
    """Whether a module's class calls transformers' experts interface: `use_experts_implementation` made it."""
    return (
        hasattr(type(module).forward, "__wrapped__")
        and hasattr(type(module), "_apply_gate")
        and all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed"))
        and hasattr(getattr(module, "config", None), "_experts_implementation")
    )


def weights_of(module: Any) -> ExpertWeights:
    """The weights of a module for which `form_of` found a form."""
    if isinstance(module, Mxfp4Experts):
        return ExpertWeights(
            module.gate_up_proj_blocks,
            module.gate_up_proj_bias,
            module.down_proj_blocks,
            module.down_proj_bias,
            False,
            module.gate_up_proj_scales,
            module.down_proj_scales,
        )
    up = "gate_up_proj" if module.has_gate else "up_proj"
    biased = module.has_bias
    return ExpertWeights(
        getattr(module, up),
        getattr(module, f"{up}_bias") if biased else None,
        module.down_proj,
        module.down_proj_bias if biased else None,
        module.is_transposed,
    )


def choices_of(module: Any) -> int:
    """Experts per token, by the config's name for it; 2 if the config has none of the known names."""
    for name in ("num_experts_per_tok", "top_k", "moe_k", "num_experts_per_token", "moe_topk", "top_k_experts"):
        value = getattr(module.config, name, None)
        if isinstance(value, int):
            return value
    return 2


def idle_bytes(view: nn.Module) -> int:
    """Bytes of a view's experts that a token does not choose, and so is not multiplied with."""
    idle = 0.0
    for module in view.modules():
        if dispatches(module) or isinstance(module, Mxfp4Experts):
            experts = getattr(module, "num_experts", 0)
            held = sum(parameter.nbytes for parameter in module.parameters())
            idle += held * max(0.0, 1 - choices_of(module) / experts) if isinstance(experts, int) and experts else 0
    return int(idle)


def form_of(module: Any) -> GateForm | None:
    """What a module that `dispatches`, or has MXFP4 weights, does between its products; None if it is not known."""
    known = _packed_weights if isinstance(module, Mxfp4Experts) else _plain_weights
    if getattr(module, "has_post_expert_norm", False) or not known(module):
        return None
    with torch.no_grad():
        return _same_activation(module)


def _plain_weights(module: Any) -> bool:
    """Whether the weights are plain parameters of one dtype, with the shapes that the layout demands."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = [up, "down_proj", *((f"{up}_bias", "down_proj_bias") if module.has_bias else ())]
    found = [module._parameters.get(name) for name in names]
    # A quantized or widened weight is of another class; an adapter makes a property of it.
    if any(type(parameter) is not nn.Parameter for parameter in found):
        return False
    if len({parameter.dtype for parameter in found}) != 1 or found[0].dtype not in _DTYPES:
        return False
    weights = weights_of(module)
    if weights.up.dim() != 3 or weights.down.dim() != 3:
        return False
    outputs = weights.intermediate * (2 if module.has_gate else 1)
    inner, outer = (1, 2) if weights.transposed else (2, 1)
    return (
        weights.up.shape[0] == weights.experts
        and weights.up.shape[inner] == weights.hidden
        and weights.up.shape[outer] == outputs
        and (weights.up_bias is None or weights.up_bias.shape == (weights.experts, outputs))
        and (weights.down_bias is None or weights.down_bias.shape == (weights.experts, weights.hidden))
        and all(one is None or one.stride(-1) == 1 for one in (weights.up_bias, weights.down_bias))
    )


def _packed_weights(module: Mxfp4Experts) -> bool:
    """Whether the weights are plain parameters in MXFP4 that our kernels read exactly."""
    if any(type(parameter) is not nn.Parameter for parameter in module._parameters.values()):
        return False
    weights = weights_of(module)
    blocks, scales = (weights.up, weights.down), (weights.up_scales, weights.down_scales)
    biases = (weights.up_bias, weights.down_bias)
    if any(one is None for one in (*scales, *biases)) or biases[0].dtype != biases[1].dtype:  # type: ignore[union-attr]
        return False
    if weights.dtype not in _DTYPES or weights.intermediate * 2 != weights.up.shape[1]:
        return False
    for block, scale, bias in zip(blocks, scales, biases, strict=True):
        assert scale is not None
        assert bias is not None
        if block.dtype != torch.uint8 or scale.dtype != torch.uint8 or not block.is_contiguous():
            return False
        if block.shape != (*scale.shape, GROUP // 2) or bias.shape != scale.shape[:2] or bias.stride(-1) != 1:
            return False
        if int(scale.max()) > LARGEST_SCALE:
            return False
    return weights.up.shape[0] == weights.experts and weights.up.shape[2] * GROUP == weights.hidden


def _same_activation(module: Any) -> GateForm | None:
    limits = _numbers(module, "limit")
    products = [_example(module.has_gate, scale) for scale in (1.0, *(2.0 * limit for limit in limits))]
    try:
        apply = module._apply_gate if module.has_gate else module.act_fn
        wanted = [apply(product.clone()) for product in products]
    except Exception:  # code of a family that needs other sizes, or another device
        return None
    if any(not isinstance(want, torch.Tensor) or want.dtype != torch.float32 for want in wanted):
        return None
    for form in _forms(module.has_gate, limits, _numbers(module, "alpha")):
        if all(_equal(activate(form, product), want) for product, want in zip(products, wanted, strict=True)):
            return form
    return None


def _forms(gated: bool, limits: list[float], alphas: list[float]) -> Iterator[GateForm]:
    """All forms that a module's numbers allow, the usual ones first."""
    for activation, alpha in [
        *(("silu", alpha) for alpha in dict.fromkeys([*_ALPHAS, *alphas])),
        *((name, 1.0) for name in _ACTIVATIONS[1:]),
    ]:
        if not gated:
            yield GateForm(activation, gated=False, alpha=alpha)
            continue
        for limit, shift, interleaved in itertools.product((0.0, *limits), (0.0, 1.0), (False, True)):
            yield GateForm(activation, interleaved=interleaved, alpha=alpha, limit=limit, shift=shift)


def _numbers(module: nn.Module, word: str) -> list[float]:
    """Positive numbers of a module whose names hold `word`."""
    found = [
        float(value)
        for name, value in vars(module).items()
        if word in name and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    return [value for value in dict.fromkeys(found) if 0 < value < 1e6]


def _example(gated: bool, scale: float) -> torch.Tensor:
    """Values [rows, outputs] that tell the forms apart: small ones, and such as lie beyond a limit."""
    generator = torch.Generator("cpu").manual_seed(0)
    product = torch.randn(16, _SIZE * (2 if gated else 1), generator=generator, device="cpu") * 3
    product[8:] *= max(scale, 4.0)
    product[12:] *= 1e3
    return product


def _equal(got: torch.Tensor, want: torch.Tensor) -> bool:
    return got.shape == want.shape and torch.allclose(got, want, rtol=1e-5, atol=1e-5)
