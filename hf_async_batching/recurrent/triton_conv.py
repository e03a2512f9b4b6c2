"""Triton kernels for depthwise causal convolutions over packed tokens; the reference is `reference.causal_conv`."""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.attention.base import DecodeContext
from hf_async_batching.recurrent.conv_kernels import conv_kernel, keep_kernel
from hf_async_batching.recurrent.step import RecurrentStep

_BLOCK = 256


def row_conv(
    step: RecurrentStep,
    key: Hashable,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """Convolve packed tokens, and keep each row's last inputs.

    Args:
        step: The step.
        key: Name of the state.
        hidden: [1, channels, tokens].
        weight: [channels, width].
        bias: [channels], or None.
        activation: "" or a name of SiLU.

    Returns:
        [1, channels, tokens].

    Raises:
        NotImplementedError: The activation has no kernel.
    """
    if activation not in ("", "silu", "swish"):
        raise NotImplementedError(f"no kernel convolves with the activation {activation!r}")
    channels, tokens = hidden.shape[1:]
    width = weight.shape[1]
    context = step.context
    table = step.tables.table(key, (channels, width - 1), hidden.dtype)
    x = hidden[0].T
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    blocks = triton.cdiv(channels, _BLOCK)
    decodes = isinstance(context, DecodeContext)
    conv_kernel[(tokens, blocks)](
        *(x, weight, weight if bias is None else bias, table, context.rows, context.positions, out),
        *(channels, x.stride(0), weight.stride(0), table.stride(0), width - 1),
        WIDTH=width,
        BLOCK=_BLOCK,
        HAS_BIAS=bias is not None,
        SILU=bool(activation),
        DECODES=decodes,
        KEEP=decodes and not step.frozen,
    )
    if not isinstance(context, DecodeContext) and not step.frozen:
        keep_kernel[(context.tile_rows.shape[0], blocks)](
            *(x, table, context.rows, context.positions),
            *(context.tile_rows, context.tile_queries, context.tile_lengths),
            *(tokens, channels, x.stride(0), table.stride(0), width - 1),
            WIDTH=width,
            BLOCK=_BLOCK,
        )
    return out.T[None]
