"""The typed entry to the sampling kernels: tokens for rows with the usual filters."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.core.plan import Features
from hf_async_batching.sampling import triton_kernels as kernels
from hf_async_batching.sampling.metadata import SamplingMetadata

_MARK_BLOCK = 64

# Logits per tile of a kernel.
_TILE = 2048
# Tiles per program of the search for the smallest E / p.
_TILES = 8


def serves(features: Features) -> bool:
    """Whether the kernels support everything that a step's rows need."""
    return (features.sampling or features.penalty) and features.top_k >= 0 and not features.stages


def choose(logits: torch.Tensor, rows: SamplingMetadata, features: Features) -> torch.Tensor:
    """Choose one token per row by temperature, top-k, top-p, min-p and the repetition penalty, or by arg-max.

    Args:
        logits: [rows, vocab], any float dtype, the last dimension contiguous; not changed.
        rows: Parameters of the rows; with histories if there is a penalty.
        features: Needs of the rows together; see `serves`.

    Returns:
        int32 [rows], outcomes (see `outcomes`). If more than 1,024 tokens are as probable as the `top_k`-th (4,096 if
        any row's `top_k` is above 64), the larger ids are dropped.
    """
    count, vocab = logits.shape
    device = logits.device
    wide = features.top_k > 64
    group = 32 if wide else 128
    groups = triton.cdiv(vocab, group)
    padded = triton.next_power_of_2(groups)
    tile = _TILE // group
    seen, seen_stride, owners = logits, 0, rows.params
    if features.penalty:
        assert rows.memory is not None and rows.memory.seen is not None and rows.rows is not None
        seen, owners = rows.memory.seen, rows.rows
        seen_stride = seen.stride(0)
    maxima = torch.empty(count, groups, dtype=torch.float32, device=device)
    sums = torch.empty_like(maxima) if features.sampling else maxima
    tokens = torch.empty(count, dtype=torch.int32, device=device)
    params, positions = rows.params.contiguous(), rows.positions
    shared = {"PARAMS": params.shape[1], "GROUP": group, "HAS_SEEN": features.penalty}
    source = (logits, logits.stride(0), seen, seen_stride, owners, params)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        kernels.group_maxima_kernel[(count, triton.cdiv(groups, 2 * tile))](
            *source, maxima, sums, vocab, groups, TILE=2 * tile, HAS_FREE=features.sampling, num_warps=4, **shared
        )
        lows = torch.empty(count, dtype=torch.int32, device=device)
        totals = torch.empty(count, dtype=torch.float32, device=device)
        kernels.bounds_kernel[(count,)](
            *source, maxima, sums, lows, totals, tokens, vocab, groups,
            GROUPS=padded, HAS_FREE=features.sampling, num_warps=4, **shared,
        )  # fmt: skip
        if features.sampling:
            tiles = triton.cdiv(groups, tile)
            splits = triton.cdiv(tiles, _TILES)
            best = torch.empty(count, splits, dtype=torch.float32, device=device)
            best_tokens = torch.empty(count, splits, dtype=torch.int32, device=device)
            kernels.perturbed_kernel[(count, splits)](
                *source, positions, maxima, lows, best, best_tokens, vocab, groups,
                TILE=tile, TILES=_TILES, GROUPS=padded, num_warps=4, **shared,
            )  # fmt: skip
            kernels.accept_kernel[(count,)](
                *source, positions, maxima, totals, best, best_tokens, tokens, vocab, groups, splits, tiles,
                TILE=tile, GROUPS=padded, SPLITS=triton.next_power_of_2(splits), num_warps=8, **shared,
            )  # fmt: skip
        if features.top_k:
            capacity = 4096 if wide else 1024
            chosen = torch.empty(count, groups, dtype=torch.int32, device=device)
            values = torch.empty(count, capacity, dtype=torch.float32, device=device)
            value_tokens = torch.empty(count, capacity, dtype=torch.int32, device=device)
            kernels.draw_bounded_kernel[(count,)](
                *source, positions, maxima, chosen, values, value_tokens, tokens, vocab, groups,
                TILE=tile, GROUPS=padded, CAPACITY=capacity, num_warps=8, **shared,
            )  # fmt: skip
    return tokens


def mark_seen(rows: torch.Tensor, token_ids: torch.Tensor, seen: torch.Tensor) -> None:
    """Record the input tokens of a decode step.

    Args:
        rows: int32 [entries]; no row except 0 occurs twice.
        token_ids: int64 [entries].
        seen: uint8 [rows, vocab], written.
    """
    size = rows.shape[0]
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        kernels.mark_seen_kernel[(triton.cdiv(size, _MARK_BLOCK),)](
            rows, token_ids, seen, seen.stride(0), size, BLOCK=_MARK_BLOCK, num_warps=2
        )
