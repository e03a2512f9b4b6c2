"""The door to products with weights of 4 bits whose neighbouring columns share a byte.

Importing it imports triton: import it on demand.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.devices.pdl import supports_pdl
from hf_async_batching.linear.quantized.nibble_kernel import nibble_dot_kernel, nibble_vector_kernel
from hf_async_batching.linear.quantized.tables import TABLES, permute_assembly
from hf_async_batching.linear.quantized.weight import QuantizedWeight

MOST_VECTOR_ROWS = 4
"""Rows that the kernel without tensor cores can compute."""


class NibbleSetting(NamedTuple):
    """How a product is computed.

    Attributes:
        way: "vector" (multiplied and added in float32), "sums" (tensor cores; sums of a group are scaled), "weights"
            (tensor cores; weights are scaled in float32), "rounded" (the same in the dtype of the activations), or
            "library" for the layer's own product.
        block_n: Outputs per program.
        block_k: Inner elements per step.
        splits: Shares of the inner dimension.
        warps: Warps per program.
        stages: Loads in flight.
    """

    way: str
    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int


def block_m(rows: int, way: str) -> int:
    """Rows that a kernel computes for `rows` rows."""
    size = 1 << (rows - 1).bit_length()
    return size if way == "vector" else max(16, size)


def permutes(device: torch.device) -> bool:
    """Whether values are looked up by PTX; elsewhere a table in memory has them."""
    return device.type == "cuda" and torch.version.hip is None


def nibble_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    table: str,
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    setting: NibbleSetting,
    residual: torch.Tensor | None = None,
    *,
    high_first: bool,
) -> torch.Tensor:
    """`x @ weight.T + bias (+ residual)` for few rows, summed in float32 in an order that does not depend on timing.

    Values are rounded to the dtype of `x`. Scales stay float32.

    Args:
        x: [..., inputs], float16 or bfloat16, last stride 1.
        weight: `packed` is uint8, [outputs * inputs / 2] in rows. `scales` is one float tensor with a scale for each
            group of columns, row by row; or four tensors: the same as uint8, a table float32 [256] of what these
            stand for, float32 factors of 256 scales each, and a float32 scalar that is added.
        table: A key of `tables.TABLES`: the values that numbers of 4 bits stand for.
        bias: [outputs] or None.
        counters: As in `skinny_linear`.
        setting: How to compute it; not "library".
        residual: [..., outputs], contiguous, the dtype of `x`: added to the rounded product. None for none.
        high_first: Whether the high half of a byte holds the first of its two columns.

    Returns:
        [..., outputs], contiguous, the dtype of `x`.
    """
    n, k = weight.outputs, weight.inputs
    flat = x.reshape(-1, k)
    rows = flat.shape[0]
    output = x.new_empty((*x.shape[:-1], n))
    partial = x.new_empty((setting.splits, rows, n), dtype=torch.float32) if setting.splits > 1 else output
    blocks = triton.cdiv(k, setting.block_k)
    early = supports_pdl(x.device)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    by_ptx = permutes(x.device)
    nested = len(weight.scales) == 4
    scale, scale_table, scale_scale, scale_shift = weight.scales if nested else (weight.scales[0],) * 4
    if setting.way == "vector":
        kernel: Any = nibble_vector_kernel
        options |= {"STAGES": setting.stages}
    else:
        kernel = nibble_dot_kernel
        options |= {"SCALE_FIRST": setting.way != "sums", "SCALE_ROUNDED": setting.way == "rounded"}
        options["num_stages"] = setting.stages
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[(triton.cdiv(n, setting.block_n), setting.splits)](
            flat, weight.packed, weight.scales[0] if by_ptx else table_on(table, x.device),
            scale, scale_table, scale_scale, scale_shift,
            output if bias is None else bias, output if residual is None else residual, output, partial, counters,
            rows, n, k, flat.stride(0), k // 2, k // weight.group, triton.cdiv(blocks, setting.splits),
            BLOCK_M=block_m(rows, setting.way), BLOCK_N=setting.block_n, BLOCK_K=setting.block_k, GROUP=weight.group,
            SPLITS=setting.splits, EVEN_K=k % setting.block_k == 0, HIGH_FIRST=high_first, NESTED=nested,
            ASSEMBLY=permute_assembly(table, "bf16" if x.dtype == torch.bfloat16 else "fp16") if by_ptx else "",
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, EARLY=early, num_warps=setting.warps,
            **options,
        )  # fmt: skip
    return output


@functools.cache
def table_on(table: str, device: torch.device) -> torch.Tensor:
    """A table of values as float32 [16]."""
    return torch.tensor(TABLES[table], dtype=torch.float32, device=device)


def default_setting(rows: int, n: int, k: int, group: int) -> NibbleSetting:
    """The setting by rule.

    Args:
        rows: Rows of activations.
        n: Outputs.
        k: Inner dimension.
        group: Columns that share a scale.
    """
    if rows <= 2:
        return NibbleSetting("vector", 8, max(512, group), 1, 4, 3)
    setting = NibbleSetting("sums", 64, min(group, 128), 1, 4, 5)
    strips = -(-n // setting.block_n)
    while strips * setting.splits < 132 and k // setting.block_k >= 16 * setting.splits and setting.splits < 8:
        setting = setting._replace(splits=setting.splits * 2)
    return setting


def candidates(rows: int, n: int, k: int, group: int) -> list[NibbleSetting]:
    """Settings worth measuring on a card."""
    out = []
    if rows <= MOST_VECTOR_ROWS:
        for block_n, block_k, warps, stages in (
            (4, 1024, 4, 2),
            (8, 512, 4, 2),
            (8, 512, 4, 3),
            (16, 256, 4, 3),
            (8, 1024, 8, 2),
            (16, 512, 8, 3),
            (4, 512, 2, 3),
        ):
            if block_k >= group:
                out.append(NibbleSetting("vector", block_n, block_k, 1, warps, stages))
    for block_n, block_k, warps, stages in (
        (64, group, 4, 4),
        (64, group, 4, 6),
        (128, group, 4, 4),
        (128, group, 8, 4),
    ):
        if block_k <= 128:
            out += _shared_out("sums", block_n, block_k, warps, stages, n, k)
    for block_n, block_k, warps, stages in (
        (64, 128, 4, 4),
        (64, 256, 4, 3),
        (128, 128, 4, 3),
        (128, 128, 8, 4),
    ):
        if block_k >= group:
            out += _shared_out("weights", block_n, block_k, warps, stages, n, k)
    return out


def _shared_out(way: str, block_n: int, block_k: int, warps: int, stages: int, n: int, k: int) -> list[NibbleSetting]:
    out = []
    for splits in (1, 2, 4, 8):
        programs = -(-n // block_n) * splits
        if splits > 1 and (programs > 132 * 6 or k // block_k < 4 * splits):
            continue
        out.append(NibbleSetting(way, block_n, block_k, splits, warps, stages))
    return out
