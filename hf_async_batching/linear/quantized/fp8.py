"""The door to products with 8-bit floats that have a scale for each block of 128 x 128.

Importing it imports triton: import it on demand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.devices.pdl import supports_pdl
from hf_async_batching.linear.quantized.fp8_kernel import fp8_block_kernel
from hf_async_batching.linear.quantized.weight import QuantizedWeight

BLOCK = 128


class Fp8Setting(NamedTuple):
    """Outputs per program, shares of the inner dimension, warps, and loads in flight.

    Attributes:
        way: "dot", or "library" for the layer's own product.
    """

    way: str
    block_n: int
    splits: int
    warps: int
    stages: int


def fp8_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    setting: Fp8Setting,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias (+ residual)` for few rows, with `x` quantized to 8-bit floats as the layer itself does it.

    Args:
        x: [..., inputs], float16 or bfloat16, last stride 1.
        weight: `packed` is float8_e4m3fn [outputs, inputs], `scales` one float32 tensor [outputs / 128, inputs / 128],
            rounded up. `inputs` is a multiple of 128.
        bias: [outputs] or None.
        counters: As in `skinny_linear`.
        setting: How to compute it; not "library".
        residual: [..., outputs], contiguous, the dtype of `x`: added to the rounded product. None for none.

    Returns:
        [..., outputs], contiguous, the dtype of `x`.
    """
    n, k = weight.outputs, weight.inputs
    flat = x.reshape(-1, k)
    rows = flat.shape[0]
    output = x.new_empty((*x.shape[:-1], n))
    partial = x.new_empty((setting.splits, rows, n), dtype=torch.float32) if setting.splits > 1 else output
    early = supports_pdl(x.device)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        fp8_block_kernel[(triton.cdiv(n, setting.block_n), setting.splits)](
            flat, weight.packed, weight.scales[0], output if bias is None else bias,
            output if residual is None else residual, output, partial, counters, rows, n, k, flat.stride(0),
            k // BLOCK, triton.cdiv(k // BLOCK, setting.splits), BLOCK_M=max(16, 1 << (rows - 1).bit_length()),
            BLOCK_N=setting.block_n, BLOCK_K=BLOCK, SCALE_N=BLOCK, SPLITS=setting.splits, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, EARLY=early, num_warps=setting.warps, num_stages=setting.stages,
            **options,
        )  # fmt: skip
    return output


def default_setting(n: int, k: int) -> Fp8Setting:
    """The setting by rule for a weight [n, k]: enough programs for the card."""
    setting = Fp8Setting("dot", 64, 1, 4, 5)
    while -(-n // 64) * setting.splits < 132 and k // BLOCK >= 8 * setting.splits and setting.splits < 8:
        setting = setting._replace(splits=setting.splits * 2)
    return setting


def candidates(n: int, k: int) -> list[Fp8Setting]:
    """Settings worth measuring on a card."""
    out = []
    for block_n, warps, stages in ((64, 4, 4), (64, 4, 6), (128, 4, 4), (128, 8, 5)):
        for splits in (1, 2, 4):
            if splits == 1 or (-(-n // block_n) * splits <= 132 * 6 and k // BLOCK >= 4 * splits):
                out.append(Fp8Setting("dot", block_n, splits, warps, stages))
    return out
