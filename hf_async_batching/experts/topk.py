"""A router's choice of experts as one operator, for compiled code.

torch's `topk` takes two launches, a selection and a sort, and is foreign to the compiler. So no compiled code beside
it can use programmatic dependent launch (`model/compile/pdl_check.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from hf_async_batching.devices.pdl import supports_pdl
from hf_async_batching.runtime.triton_start import runs_triton

MOST_SCORES, MOST_CHOSEN = 1024, 32
"""The longest row that one warp holds in registers, and the most rounds of its search."""

_library: Any = torch.library.Library("hf_async_batching", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("topk(Tensor x, int k, bool softmax) -> Tensor")


def packed_topk(x: torch.Tensor, k: int, softmax: bool) -> torch.Tensor:
    """The largest scores of each row and their places, in one tensor.

    One result, because Inductor waits for an operator with two results only before it reads one of them.

    Args:
        x: [..., scores], float32, bfloat16 or float16.
        k: How many; at most `MOST_CHOSEN`, and at most as many as there are scores.
        softmax: Whether the scores are the softmax of `x` in float32.

    Returns:
        Int32 [..., 2 * k]: the bits of the scores as float32, the largest first, and their places. The kernel takes
        the first of equal scores, as torch's kernel does.
    """
    if runs_triton(x.device) and x.shape[-1] <= MOST_SCORES:
        return topk_by_kernel(x, k, softmax)
    scores = x.float()
    if softmax:
        scores = scores.softmax(-1)
    values, places = scores.topk(k, dim=-1)
    return torch.cat([values.view(torch.int32), places.to(torch.int32)], dim=-1)


def topk_by_kernel(x: torch.Tensor, k: int, softmax: bool) -> torch.Tensor:
    """As `packed_topk`, with at most `MOST_SCORES` scores, on a device with Triton."""
    import triton  # type: ignore[import-untyped,unused-ignore]

    from hf_async_batching.experts.topk_kernel import topk_kernel

    scores = x.shape[-1]
    rows = x.reshape(-1, scores)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty(*x.shape[:-1], 2 * k, dtype=torch.int32, device=x.device)
    early = supports_pdl(x.device)
    options = {"launch_pdl": True} if early else {}
    if out.numel():
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            topk_kernel[(rows.shape[0],)](
                rows, out, rows.stride(0), scores, K=k, SOFTMAX=softmax, BLOCK=triton.next_power_of_2(scores),
                CHOSEN=triton.next_power_of_2(k), EARLY=early, num_warps=1, **options,
            )  # fmt: skip
    return out


def _packed_shape(x: torch.Tensor, k: int, softmax: bool) -> torch.Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], 2 * k), dtype=torch.int32)


_library.impl("topk", packed_topk, "CompositeExplicitAutograd")
torch.library.register_fake("hf_async_batching::topk", _packed_shape, lib=_library)
