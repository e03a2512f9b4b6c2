"""The experts in PyTorch: what the kernels are compared with, and the activation by which a family's is recognised."""

from __future__ import annotations

import torch
from torch.nn import functional

from hf_async_batching.experts.layer import ExpertWeights, GateForm
from hf_async_batching.experts.mxfp4 import dequantize


def activate(form: GateForm, product: torch.Tensor) -> torch.Tensor:
    """What a layer does between its two products.

    Args:
        form: The activation.
        product: [..., outputs of the first product].

    Returns:
        [..., intermediate].
    """
    if not form.gated:
        return _activation(form, product)
    if form.interleaved:
        gate, up = product[..., ::2], product[..., 1::2]
    else:
        gate, up = product.chunk(2, dim=-1)
    if form.limit:
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    return _activation(form, gate) * (up + form.shift)


def _activation(form: GateForm, x: torch.Tensor) -> torch.Tensor:
    match form.activation:
        case "silu":
            return x * torch.sigmoid(x * form.alpha)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu":
            return functional.relu(x)
        case "relu2":
            return functional.relu(x).square()
    raise ValueError(f"no expert has the activation {form.activation!r}")


def experts(
    hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights, form: GateForm
) -> torch.Tensor:
    """The weighted sum of each token's experts, one choice of the router after the other.

    Args:
        hidden: [tokens, hidden].
        index: [tokens, choices], int; a number that is no expert adds nothing.
        weights: [tokens, choices].
        layer: The experts.
        form: Their activation.

    Returns:
        [tokens, hidden], the dtype of `hidden`.
    """
    up, down = layer.up, layer.down
    if layer.up_scales is not None and layer.down_scales is not None:
        up = dequantize(up, layer.up_scales, hidden.dtype)
        down = dequantize(down, layer.down_scales, hidden.dtype)
    if layer.transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    out = torch.zeros(hidden.shape, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
                      device=hidden.device)  # fmt: skip
    for k in range(index.shape[1]):
        for expert in range(layer.experts):
            tokens = (index[:, k] == expert).nonzero()[:, 0]
            product = functional.linear(hidden[tokens], up[expert], _of(layer.up_bias, expert))
            product = functional.linear(activate(form, product), down[expert], _of(layer.down_bias, expert))
            out[tokens] += product.to(out.dtype) * weights[tokens, k, None].to(out.dtype)
    return out.to(hidden.dtype)


def _of(bias: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if bias is None else bias[expert]
