# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Compute the arg-max of each row of logits on the whole card.

torch gives few programs to a row, so 32 rows of a large vocabulary leave most of a card idle. Here many programs share
a row, and a second kernel compares their results. On a CPU it is torch's own arg-max.

The parameters of a kernel have no Python types; `argmax` is the typed entry. Importing this module does not import
triton.
"""

from __future__ import annotations

import functools

import torch

from hf_async_batching.runtime.triton_start import runs_triton
from hf_async_batching.sampling.outcome_marks import marked

_BLOCK = 2048
_MAX_PARTS = 64


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Index of the largest logit of each row, the first of equal ones; NaN counts as the largest, as in torch.

    On a GPU, NaN counts as inf: a row with both returns the first of them.

    Args:
        logits: [rows, vocab], any float dtype.

    Returns:
        int32 [rows], outcomes (see `outcomes`): the index is marked if the largest logit is NaN or infinite.
    """
    if not runs_triton(logits.device) or logits.stride(-1) != 1 or not logits.shape[0]:
        tokens = logits.argmax(-1)
        return marked(tokens.int(), unsound=~logits.gather(1, tokens[:, None])[:, 0].isfinite())
    return argmax_in_parts(logits, _parts(logits))


def argmax_in_parts(logits: torch.Tensor, parts: int) -> torch.Tensor:
    """The same with `parts` programs per row, 1 to 64."""
    import triton  # type: ignore[import-untyped,unused-ignore]

    kernels = _kernels()
    rows, vocab = logits.shape
    values = logits.new_empty((rows, parts), dtype=torch.float32)
    indices = logits.new_empty((rows, parts), dtype=torch.int32)
    out = logits.new_empty(rows, dtype=torch.int32)
    blocks = triton.cdiv(triton.cdiv(vocab, _BLOCK), parts)
    with torch.cuda.device_of(logits):
        kernels.parts_kernel[(rows, parts)](
            logits, values, indices, vocab, logits.stride(0), blocks, parts, BLOCK=_BLOCK, num_warps=8
        )
        kernels.compare_kernel[(rows,)](values, indices, out, parts, MAX_PARTS=_MAX_PARTS, num_warps=1)
    return out


def _parts(logits: torch.Tensor) -> int:
    """Number of parts for about four programs per multiprocessor; no part is empty."""
    wanted = 4 * _multiprocessors(logits.device) // logits.shape[0]
    most = min(_MAX_PARTS, -(-logits.shape[1] // _BLOCK))
    return max(1, min(wanted, most))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _kernels():
    from hf_async_batching.sampling import argmax_kernels

    return argmax_kernels
