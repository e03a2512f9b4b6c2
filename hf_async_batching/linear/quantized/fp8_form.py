"""8-bit floats with a scale for each block of 128 x 128: transformers' `FP8Linear`."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch

from hf_async_batching.linear.quantized.form import LIBRARY, Form, Setting
from hf_async_batching.linear.quantized.weight import QuantizedWeight

BLOCK = 128


class Fp8Blocks(Form):
    """float8_e4m3fn in rows. The layer's own forward quantizes activations to the same type, and so do we."""

    def own(self, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """As transformers computes it, by kernels that it loads from the hub."""
        from transformers.integrations import finegrained_fp8

        library: Any = finegrained_fp8
        return cast(torch.Tensor, library.fp8_linear(x, weight.packed, weight.scales[0], [BLOCK, BLOCK], bias, None))

    def values(self, weight: QuantizedWeight) -> torch.Tensor:
        """The weight in float32."""
        scales = weight.scales[0].repeat_interleave(BLOCK, 0)[: weight.outputs].repeat_interleave(BLOCK, 1)
        return weight.packed.float() * scales[:, : weight.inputs]

    def serves(self, x: torch.Tensor, weight: QuantizedWeight) -> bool:  # noqa: ARG002
        """16-bit activations in rows, on a card that multiplies 8-bit floats."""
        return x.dtype in (torch.float16, torch.bfloat16) and x.stride(-1) == 1 and multiplies_float8(x.device)

    def few(
        self,
        x: torch.Tensor,
        weight: QuantizedWeight,
        bias: torch.Tensor | None,
        counters: torch.Tensor,
        setting: Setting,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `fp8.fp8_linear`."""
        from hf_async_batching.linear.quantized.fp8 import Fp8Setting, fp8_linear

        return fp8_linear(x, weight, bias, counters, cast(Fp8Setting, setting), residual)

    def choices(self, rows: int, weight: QuantizedWeight) -> tuple[Setting, list[Setting]]:  # noqa: ARG002
        """The setting by rule, and others."""
        from hf_async_batching.linear.quantized.fp8 import Fp8Setting, candidates, default_setting

        n, k = weight.outputs, weight.inputs
        return default_setting(n, k), [*candidates(n, k), Fp8Setting(LIBRARY, 0, 0, 0, 0)]

    def sources(self) -> tuple[str, ...]:
        """The kernel and its door."""
        from hf_async_batching.linear.quantized import fp8, fp8_kernel, tail

        return fp8_kernel.__file__, fp8.__file__, tail.__file__

    def tuned_rows(self, rows: int) -> int:
        """Up to 16 rows take the same kernel."""
        return max(16, 1 << (rows - 1).bit_length())


@functools.cache
def multiplies_float8(device: torch.device) -> bool:
    """Whether a card has tensor cores for float8_e4m3fn."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantized_rows(x: torch.Tensor) -> torch.Tensor:
    """What remains of activations [rows, inputs] after they are quantized, in float32; the reference."""
    groups = x.float().view(*x.shape[:-1], -1, BLOCK)
    step = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return ((groups / step).to(torch.float8_e4m3fn).float() * step).view(x.shape)


def weight_of(module: Any) -> QuantizedWeight | None:
    """The weight of a transformers `FP8Linear`; None if its blocks or its activations are of another kind."""
    weight, scale = module.weight, module.weight_scale_inv
    blocks = tuple(module.block_size or ())
    if weight.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32 or blocks != (BLOCK, BLOCK):
        return None
    if module.activation_scheme != "dynamic" or module.activation_scale is not None:
        return None
    outputs, inputs = weight.shape
    shape = -(-outputs // BLOCK), -(-inputs // BLOCK)
    if inputs % BLOCK or tuple(scale.shape) != shape or not (weight.is_contiguous() and scale.is_contiguous()):
        return None
    if getattr(module, "_deepgemm_disabled", False):
        return None
    return QuantizedWeight("fp8 blocks", weight.data, (scale.data,), outputs, inputs, BLOCK)
