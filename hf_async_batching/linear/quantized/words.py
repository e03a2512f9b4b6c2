"""The door to products with 4-bit integers, eight to a word, as GPTQ and AWQ lay them out.

Importing it imports triton: import it on demand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.devices.pdl import supports_pdl
from hf_async_batching.linear.quantized.weight import QuantizedWeight
from hf_async_batching.linear.quantized.word_kernel import word_kernel


class WordSetting(NamedTuple):
    """Outputs and inner elements per step, shares of the inner dimension, warps, and loads in flight.

    Attributes:
        way: "dot", or "library" for the layer's own product.
    """

    way: str
    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int


def word_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    setting: WordSetting,
    residual: torch.Tensor | None = None,
    *,
    along_inputs: bool,
) -> torch.Tensor:
    """`x @ weight.T + bias (+ residual)` for few rows, summed in float32 in an order that does not depend on timing.

    Args:
        x: [..., inputs], float16 or bfloat16, last stride 1.
        weight: `packed` is int32, [inputs / 8, outputs] (GPTQ) or [inputs, outputs / 8] (AWQ). `scales` are scales,
            float16 or bfloat16 [groups, outputs], and the zero points, int32 [groups, outputs / 8].
        bias: [outputs] or None.
        counters: As in `skinny_linear`.
        setting: How to compute it; not "library".
        residual: [..., outputs], contiguous, the dtype of `x`: added to the rounded product. None for none.
        along_inputs: Whether a word holds eight inputs (GPTQ), or eight outputs, even ones first (AWQ).

    Returns:
        [..., outputs], contiguous, the dtype of `x`.
    """
    n, k = weight.outputs, weight.inputs
    flat = x.reshape(-1, k)
    rows = flat.shape[0]
    output = x.new_empty((*x.shape[:-1], n))
    partial = x.new_empty((setting.splits, rows, n), dtype=torch.float32) if setting.splits > 1 else output
    scale, zeros = weight.scales
    early = supports_pdl(x.device)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        word_kernel[(n // setting.block_n, setting.splits)](
            flat, weight.packed, scale, zeros, output if bias is None else bias,
            output if residual is None else residual, output, partial, counters, rows, n, k, flat.stride(0),
            n // 8, weight.group, triton.cdiv(k // setting.block_k, setting.splits),
            BLOCK_M=max(16, 1 << (rows - 1).bit_length()), BLOCK_N=setting.block_n, BLOCK_K=setting.block_k,
            ALONG_K=along_inputs, SPLITS=setting.splits, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, EARLY=early, num_warps=setting.warps, num_stages=setting.stages,
            **options,
        )  # fmt: skip
    return output


def default_setting(n: int, k: int, group: int) -> WordSetting:
    """The setting by rule for a weight [n, k] whose groups have `group` inputs."""
    setting = WordSetting("dot", 64, min(group & -group, 128), 1, 4, 4)
    while n // 64 * setting.splits < 132 and k // setting.block_k >= 8 * setting.splits and setting.splits < 8:
        setting = setting._replace(splits=setting.splits * 2)
    return setting


def candidates(n: int, k: int, group: int) -> list[WordSetting]:
    """Settings worth measuring on a card."""
    out = []
    block_k = min(group & -group, 128)
    for block_n, size, warps, stages in (
        (64, block_k, 4, 3),
        (64, block_k, 4, 5),
        (64, max(32, block_k // 2), 4, 5),
        (128, block_k, 4, 3),
        (128, block_k, 8, 4),
    ):
        for splits in (1, 2, 4, 8):
            if n % block_n or (splits > 1 and (n // block_n * splits > 132 * 6 or k // size < 4 * splits)):
                continue
            out.append(WordSetting("dot", block_n, size, splits, warps, stages))
    return out
