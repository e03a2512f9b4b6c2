"""The door to the skinny matrix product: which products it serves, and with which settings.

Importing it imports triton: import it on demand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.devices.pdl import supports_pdl
from hf_async_batching.devices.shared_memory import shared_memory_limit
from hf_async_batching.linear.skinny_kernel import skinny_linear_kernel

MAX_ROWS = 64
"""Beyond this many rows the vendor's library is faster (measured on an H200, benchmarks/linear_sweep.py)."""


class SkinnySetting(NamedTuple):
    """Outputs and inner elements per block, shares of the inner dimension, warps, and loads in flight.

    Zeros stand for the vendor's library.
    """

    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int


LIBRARY = SkinnySetting(0, 0, 0, 0, 0)
"""The vendor's library, where it was measured to be faster."""


def block_m(rows: int) -> int:
    """Rows that the kernel computes for `rows` rows."""
    return max(16, 1 << (rows - 1).bit_length())


def shared_memory(rows: int, setting: SkinnySetting) -> int:
    """Bytes of shared memory that the loads in flight take, for 2-byte elements."""
    return (setting.block_n + block_m(rows)) * setting.block_k * 2 * setting.stages


def serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel can compute `x @ weight.T`, and is likely to be the faster way."""
    rows = x.numel() // x.shape[-1]
    return (
        1 <= rows <= MAX_ROWS
        and x.dtype == weight.dtype
        and x.dtype in (torch.float16, torch.bfloat16)
        and weight.is_contiguous()
        and weight.shape[1] % 16 == 0
        and weight.shape[0] % 16 == 0
        and x.stride(-1) == 1
    )


def default_setting(rows: int, n: int, k: int, memory: int) -> SkinnySetting:
    """The setting by rule.

    Narrow strips for small weights, so that every multiprocessor gets one; wide strips for large ones, which read the
    activations less often; and as many loads in flight as the shared memory holds. Measured on an H200 and an H100.

    Args:
        rows: Rows of activations.
        n: Outputs.
        k: Inner dimension.
        memory: Shared memory that a block may take, in bytes.
    """
    setting = SkinnySetting(128, 128, 1, 4, 4) if n >= 16384 else SkinnySetting(64, 128, 1, 4, 5)
    strips, blocks = -(-n // setting.block_n), k // setting.block_k
    while setting.splits < 4 and (
        (strips * setting.splits < 48 and blocks >= 8 * setting.splits)
        # Longer shares pay up to about one program for each multiprocessor.
        or (strips * setting.splits <= 64 and blocks >= max(16, 8 * setting.splits))
    ):
        setting = setting._replace(splits=setting.splits * 2)
    if strips * setting.splits < 132 * 2 and k >= 8192 and setting.splits == 1:
        setting = setting._replace(splits=2)
    while shared_memory(rows, setting) > memory and setting.stages > 2:
        setting = setting._replace(stages=setting.stages - 1)
    return setting


def candidates(rows: int, n: int, k: int, memory: int) -> list[SkinnySetting]:
    """Settings worth measuring on a card."""
    out = []
    for block_n, block_k, warps, stages in (
        (64, 128, 4, 5),
        (64, 128, 4, 4),
        (64, 256, 4, 3),
        (128, 64, 4, 5),
        (128, 128, 4, 4),
        (128, 128, 8, 4),
    ):
        for splits in (1, 2, 4):
            setting = SkinnySetting(block_n, block_k, splits, warps, stages)
            programs = -(-n // block_n) * splits
            if splits > 1 and (programs > 132 * 4 or k // block_k < 4 * splits):
                continue
            if shared_memory(rows, setting) <= memory:
                out.append(setting)
    return out


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    setting: SkinnySetting | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias (+ residual)` for few rows, summed in float32 in an order that does not depend on timing.

    Args:
        x: [..., k], float16 or bfloat16, last stride 1; at most `MAX_ROWS` rows in all.
        weight: [n, k], contiguous, the same dtype.
        bias: [n] or None.
        counters: int32, as many as there are strips of outputs; zero between launches. Products in two streams must
            not share them.
        setting: None for the one by rule.
        residual: [..., n], contiguous, the dtype of `x`: added to the rounded product. None for none.

    Returns:
        [..., n], contiguous, the dtype of `x`.
    """
    n, k = weight.shape
    flat = x.reshape(-1, k)
    rows = flat.shape[0]
    if setting is None:
        memory = shared_memory_limit(x.device)
        setting = default_setting(rows, n, k, memory)
    output = x.new_empty((*x.shape[:-1], n))
    partial = x.new_empty((setting.splits, rows, n), dtype=torch.float32) if setting.splits > 1 else output
    blocks = -(-k // setting.block_k)
    early = supports_pdl(x.device)
    options = {"launch_pdl": True} if early else {}
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        skinny_linear_kernel[(triton.cdiv(n, setting.block_n), setting.splits)](
            flat, weight, output if bias is None else bias, output if residual is None else residual, output, partial,
            counters, rows, n, k, flat.stride(0),
            triton.cdiv(blocks, setting.splits), BLOCK_M=block_m(rows), BLOCK_N=setting.block_n,
            BLOCK_K=setting.block_k, SPLITS=setting.splits, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            EVEN_K=k % setting.block_k == 0, EARLY=early, num_warps=setting.warps, num_stages=setting.stages,
            **options,
        )  # fmt: skip
    return output
