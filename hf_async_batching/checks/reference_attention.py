"""Torch's attention without the plans that cuDNN makes for each new length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.overrides import TorchFunctionMode


class FlashFirst(TorchFunctionMode):
    """While entered, and in the entering thread only: attention takes torch's flash kernels where they serve.

    On Hopper `scaled_dot_product_attention` prefers cuDNN, which loads for 0.1 s and then plans each new length for
    some 80 ms: much for a few tokens that are computed once. Torch's own switch for that (`sdpa_kernel`) is the whole
    process's, in which other threads compute.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    # The flash operator takes no mask, and autocast does not know it.
    if query.is_cuda and attn_mask is None and not torch.is_autocast_enabled("cuda"):
        params = SDPAParams(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        # Other head sizes would have to be padded.
        if query.shape[-1] % 8 == 0 and can_use_flash_attention(params):
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            output: torch.Tensor = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
            return output
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
