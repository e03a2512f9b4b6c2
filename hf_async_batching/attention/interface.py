"""The attention function that transformers' modules call, registered once under `NAME`.

Context reaches it as the keyword argument `paged` of the model's forward. Families whose layers drop unknown keyword
arguments (StableLM, for one) get it from the thread: the engine's worker sets it around the forward.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from hf_async_batching.attention.backend import AttentionOptions
from hf_async_batching.attention.context import AttentionContext
from hf_async_batching.errors import UnsupportedModelError

NAME = "hf_async_batching_paged"


@dataclass(frozen=True, slots=True)
class PagedLayer:
    """What the probe learned of one attention module."""

    index: int
    sliding_window: int | None


class _Active(threading.local):
    call: Any = None


_active = _Active()


@contextmanager
def active(call: PagedCall) -> Iterator[None]:
    """Offer `call` to attention functions of this thread whose model dropped the keyword argument."""
    _active.call = call
    try:
        yield
    finally:
        _active.call = None


class PagedCall:
    """What `paged` carries through a forward: the step's context, and the model's layers by identity of module."""

    def __init__(self, context: AttentionContext, layers: dict[int, PagedLayer]) -> None:
        self.context = context
        self.layers = layers


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    paged: PagedCall | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' modules on packed tokens.

    Args:
        module: The attention module.
        query: [1, num_heads, tokens, key_dim].
        key: [1, num_kv_heads, tokens, key_dim].
        value: [1, num_kv_heads, tokens, value_dim].
        attention_mask: Must be None: who sees whom follows from the context.
        scaling: Factor on the scores; `key_dim ** -0.5` where None.
        softcap: See `AttentionOptions`.
        paged: The step, where the family passes keyword arguments on.

    Returns:
        [1, tokens, num_heads, value_dim], and None for the weights.

    Raises:
        UnsupportedModelError: The family asks for something that the kernels do not do.
    """
    call = paged if paged is not None else _active.call
    if call is None:
        raise RuntimeError(
            f"attention implementation {NAME!r} works inside the engine of hf_async_batching only; "
            "set `attn_implementation` to 'sdpa' or 'eager' for a plain forward"
        )
    if attention_mask is not None:
        raise UnsupportedModelError(f"{type(module).__name__} builds its own attention mask, which is not served")
    layer = call.layers[id(module)]
    options = AttentionOptions(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        sliding_window=layer.sliding_window,
        softcap=softcap,
    )
    assert call.context.backend is not None
    # A batch of one: packed tokens take the place of the batch dimension.
    out = call.context.backend.attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layer.index,
        call.context,
        options,
    )
    return out[None], None


AttentionInterface.register(NAME, paged_attention_forward)
