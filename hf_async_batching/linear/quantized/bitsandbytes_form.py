"""4-bit weights of bitsandbytes (`Linear4bit`): nf4 and fp4."""

from __future__ import annotations

from typing import Any, cast

import torch

from hf_async_batching.linear.quantized.form import LIBRARY, Form, Setting
from hf_async_batching.linear.quantized.tables import TABLES
from hf_async_batching.linear.quantized.weight import QuantizedWeight


class BitsAndBytes4(Form):
    """Two columns to a byte, the first one in its high half, and a scale for each block of a row.

    Scales may be quantized to 8 bits, in blocks of 256 ("double quantization").

    Args:
        table: A key of `tables.TABLES`.
    """

    def __init__(self, table: str) -> None:
        self.table = table

    def own(self, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """As `bitsandbytes.matmul_4bit` without gradients."""
        ops: Any = torch.ops.bitsandbytes
        packed, shape = weight.packed.view(-1, 1), [weight.outputs, weight.inputs]
        scale, *nested = weight.scales
        if hasattr(ops, "gemm_4bit"):
            if not nested:
                out = ops.gemm_4bit.default(x, packed, shape, scale, weight.group, self.table, bias=bias)
            else:
                code, outer, shift = nested
                out = ops.gemm_4bit.default(
                    x, packed, shape, outer, weight.group, self.table, bias=bias,
                    absmax_8bit=scale, absmax_code=code, absmax_offset=shift,
                )  # fmt: skip
        else:
            if nested:
                code, outer, shift = nested
                scale = ops.dequantize_blockwise.default(scale, outer, code, 256, torch.float32) + shift
            plain = ops.dequantize_4bit.default(packed, scale, weight.group, self.table, shape, x.dtype)
            out = torch.nn.functional.linear(x, plain, bias)
        return cast(torch.Tensor, out)

    def values(self, weight: QuantizedWeight) -> torch.Tensor:
        """The weight in float32."""
        packed = weight.packed.view(-1)
        numbers = torch.stack([packed >> 4, packed & 15], dim=-1).view(weight.outputs, weight.inputs)
        table = torch.tensor(TABLES[self.table], dtype=torch.float32, device=packed.device)
        scale, *nested = weight.scales
        if nested:
            code, outer, shift = nested
            scale = code[scale.long()] * outer.repeat_interleave(256)[: scale.numel()] + shift
        scales = scale.view(weight.outputs, -1).repeat_interleave(weight.group, dim=1)
        return table[numbers.long()] * scales

    def serves(self, x: torch.Tensor, weight: QuantizedWeight) -> bool:  # noqa: ARG002
        """16-bit activations in rows."""
        return x.dtype in (torch.float16, torch.bfloat16) and x.stride(-1) == 1

    def few(
        self,
        x: torch.Tensor,
        weight: QuantizedWeight,
        bias: torch.Tensor | None,
        counters: torch.Tensor,
        setting: Setting,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `nibbles.nibble_linear`."""
        from hf_async_batching.linear.quantized.nibbles import NibbleSetting, nibble_linear

        chosen = cast(NibbleSetting, setting)
        return nibble_linear(x, weight, self.table, bias, counters, chosen, residual, high_first=True)

    def choices(self, rows: int, weight: QuantizedWeight) -> tuple[Setting, list[Setting]]:
        """The setting by rule, and others."""
        from hf_async_batching.linear.quantized.nibbles import NibbleSetting, candidates, default_setting

        size = rows, weight.outputs, weight.inputs, weight.group
        return default_setting(*size), [*candidates(*size), NibbleSetting(LIBRARY, 0, 0, 0, 0, 0)]

    def sources(self) -> tuple[str, ...]:
        """The kernel and its door."""
        from hf_async_batching.linear.quantized import nibble_kernel, nibbles, tail

        return nibble_kernel.__file__, nibbles.__file__, tail.__file__


def weight_of(module: Any) -> QuantizedWeight | None:
    """The weight of a bitsandbytes `Linear4bit`; None if it is not quantized yet, or in a way that is not served."""
    parameter, state = module.weight, getattr(module.weight, "quant_state", None)
    if state is None or parameter.dtype != torch.uint8 or state.quant_type not in ("nf4", "fp4"):
        return None
    if getattr(state, "packing_format_for_cpu", False) or tuple(state.shape) != (
        module.out_features,
        module.in_features,
    ):
        return None
    if module.compute_type_is_set and module.compute_dtype not in (torch.float16, torch.bfloat16):
        return None
    outputs, inputs = state.shape
    code = torch.tensor(TABLES[state.quant_type], dtype=torch.float32)
    if inputs % state.blocksize or not torch.equal(state.code.detach().float().cpu(), code):
        return None
    scales: tuple[torch.Tensor, ...] = (state.absmax,)
    if state.state2 is not None:
        if state.state2.blocksize != 256 or state.absmax.dtype != torch.uint8:
            return None
        scales = (state.absmax, state.state2.code, state.state2.absmax, state.offset)
    if any(one.device != parameter.device or not one.is_contiguous() for one in scales):
        return None
    dtype = module.compute_dtype if module.compute_type_is_set else None
    return QuantizedWeight(
        state.quant_type, parameter.data, scales, int(outputs), int(inputs), int(state.blocksize), dtype
    )
