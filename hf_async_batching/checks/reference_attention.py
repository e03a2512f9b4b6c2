"""Torch's attention without cuDNN, which plans each new length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.overrides import TorchFunctionMode


class FlashFirst(TorchFunctionMode):
    """Makes attention use torch's flash kernels where they apply, in the thread that enters this mode.

    On Hopper `scaled_dot_product_attention` prefers cuDNN. cuDNN takes 0.1 s to load, and then some 80 ms to plan each
    new length, which is long for a few tokens that are computed once. Torch's own switch (`sdpa_kernel`) applies to
    the whole process, in which other threads compute.
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
    # The flash operator takes no mask, and autocast does not cover it.
    if query.is_cuda and attn_mask is None and not torch.is_autocast_enabled("cuda"):
        params = SDPAParams(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        # The operator needs other head sizes to be padded.
        if query.shape[-1] % 8 == 0 and can_use_flash_attention(params):
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            output: torch.Tensor = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
            return output
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
