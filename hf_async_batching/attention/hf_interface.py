"""The attention function that transformers' modules call, registered once under `NAME`.

It gets its context as the keyword argument `paged` of the model's forward. Layers of some families, such as StableLM,
drop unknown keyword arguments. They get the context from the thread: the engine's thread sets it around the forward.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from hf_async_batching.attention.base import AttentionBackend, AttentionContext, AttentionInputs, AttentionOptions
from hf_async_batching.attention.latents import LatentLayer, absorbed_attention
from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.kv_cache.paged_cache import PagedCache
from hf_async_batching.runtime.autocast import lowered

NAME = "hf_async_batching_paged"

# Keyword arguments that attention may get besides those that it uses. They repeat what the step already says, or do
# not concern attention. Any other argument could change the result.
HARMLESS = frozenset(
    {
        *("position_ids", "position_embeddings", "cache_position", "use_cache", "layer_idx"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"),
        *("num_items_in_batch", "dropout", "deterministic", "attention_mask", "sliding_window"),
    }
)


@dataclass(frozen=True, slots=True)
class PagedLayer:
    """What the probe learned of one attention module: its index in the cache, and which keys its queries see."""

    index: int
    sliding_window: int | None = None
    chunk: int | None = None


def refuse_unknown(module: torch.nn.Module, arguments: dict[str, Any]) -> None:
    """Refuse keyword arguments that could change attention's result.

    Args:
        module: The attention module, for the message.
        arguments: Arguments that it passes besides those of `paged_attention_forward`.

    Raises:
        UnsupportedModelError: An argument is not None and not in `HARMLESS`.
    """
    for name, value in arguments.items():
        if name not in HARMLESS and value is not None and not (name == "is_causal" and value is True):
            raise UnsupportedModelError(f"{type(module).__name__} passes `{name}` to attention, which is not served")


class _Active(threading.local):
    call: Any = None


_active = _Active()


@contextmanager
def active(call: PagedCall) -> Iterator[None]:
    """Offer `call` to attention functions of this thread, for models that drop the keyword argument."""
    _active.call = call
    try:
        yield
    finally:
        _active.call = None


class PagedCall:
    """The value that `paged` carries through a forward.

    Args:
        context: The step.
        cache: The pages.
        backend: The kernels.
        layers: The model's attention layers, by the identity of their modules.
        layer_at: Layer index by the address of the layer's tag, for compiled code.
    """

    def __init__(
        self,
        context: AttentionContext,
        cache: PagedCache,
        backend: AttentionBackend,
        layers: dict[int, PagedLayer],
        layer_at: dict[int, int],
    ) -> None:
        self._context = context
        self._cache = cache
        self._backend = backend
        self.layers = layers
        self.layer_at = layer_at

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, options: AttentionOptions
    ) -> torch.Tensor:
        """Attention of one layer; the arguments are those of `AttentionInputs`."""
        inputs = AttentionInputs(query, key, value, layer, self._context, self._cache, options)
        return self._backend.attend(inputs)

    def attend_latents(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        weight: torch.Tensor,
        plain: int,
        layer: int,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attention of one layer that keeps latents; see `absorbed_attention`.

        Args:
            query: [tokens, num_heads, plain + rotary].
            key: [tokens, rank + rotary], what pages keep of the tokens.
            weight: The expansion.
            plain: See `LatentLayer`.
            layer: Index of the layer in the cache.
            options: Scaling, window, soft cap, chunk, sinks.

        Returns:
            [tokens, num_heads, value_dim].
        """
        key = key[:, None]
        value = key[..., : weight.shape[1]]

        def attend(latent: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
            context, cache = self._context, self._cache
            return self._backend.attend(AttentionInputs(latent, key, value, layer, context, cache, options, rotary))

        return absorbed_attention(query, weight, plain, attend, self._backend.multiply)


def attach_tags(modules: list[tuple[torch.nn.Module, PagedLayer]], device: torch.device) -> dict[int, int]:
    """Give the attention modules of a view tags by which compiled code identifies its layer.

    A tag is a small tensor, and only its address matters. A layer index would be a constant in compiled code, so every
    layer of a model would need its own code.

    Returns:
        Layer index by address, for `PagedCall`.
    """
    # 64 bytes each, because compiled code copies inputs whose alignment differs from the example's.
    tags = torch.zeros(len(modules), 16, dtype=torch.int32, device=device)
    for tag, (module, layer) in zip(tags, modules, strict=True):
        module._paged_tag = tag
        # A negative window stands for the size of a chunk.
        module._paged_window = layer.sliding_window or -(layer.chunk or 0)  # type: ignore[assignment]
    return {tag.data_ptr(): layer.index for tag, (_, layer) in zip(tags, modules, strict=True)}


_library: Any = torch.library.Library("hf_async_batching", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor tag, float scaling, int window, float softcap,"
    " Tensor? sinks) -> Tensor"
)
_library.define(
    "latent_attention(Tensor query, Tensor key, Tensor weight, int plain, Tensor tag, float scaling, int window,"
    " float softcap, Tensor? sinks) -> Tensor"
)


def _options(scaling: float, window: int, softcap: float, sinks: torch.Tensor | None) -> AttentionOptions:
    seen = window if window > 0 else None
    return AttentionOptions(scaling, seen, softcap or None, -window if window < 0 else None, sinks)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tag: torch.Tensor,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    call: PagedCall = _active.call
    options = _options(scaling, window, softcap, sinks)
    return call.attend(query, key, value, call.layer_at[tag.data_ptr()], options)


def _latent_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    weight: torch.Tensor,
    plain: int,
    tag: torch.Tensor,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    call: PagedCall = _active.call
    options = _options(scaling, window, softcap, sinks)
    return call.attend_latents(query, key, weight, plain, call.layer_at[tag.data_ptr()], options)


def _latent_attention_shape(
    query: torch.Tensor, key: torch.Tensor, weight: torch.Tensor, plain: int, *_: Any
) -> torch.Tensor:
    del key
    return query.new_empty((query.shape[0], query.shape[1], weight.shape[0] // query.shape[1] - plain))


def _attention_shape(
    query: torch.Tensor,
    key: torch.Tensor,  # noqa: ARG001
    value: torch.Tensor,
    tag: torch.Tensor,  # noqa: ARG001
    scaling: float,  # noqa: ARG001
    window: int,  # noqa: ARG001
    softcap: float,  # noqa: ARG001
    sinks: torch.Tensor | None,  # noqa: ARG001
) -> torch.Tensor:
    return query.new_empty((query.shape[0], query.shape[1], value.shape[2]))


# The schema does not say that the operator writes to the pages. Nothing else in compiled code reads them, and a
# declared mutation could make the compiler copy them.
_library.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("hf_async_batching::attention", _attention_shape, lib=_library)
_library.impl("latent_attention", _latent_attention, "CompositeExplicitAutograd")
torch.library.register_fake("hf_async_batching::latent_attention", _latent_attention_shape, lib=_library)


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    paged: PagedCall | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' modules on packed tokens.

    Args:
        module: The attention module.
        query: [1, num_heads, tokens, key_dim].
        key: [1, num_kv_heads, tokens, key_dim].
        value: [1, num_kv_heads, tokens, value_dim].
        attention_mask: Must be None: the context decides which keys a query sees.
        scaling: Factor on the scores; None for `key_dim ** -0.5`.
        softcap: See `AttentionOptions`.
        s_aux: [num_heads], the sinks of `AttentionOptions`.
        paged: The step, if the family passes keyword arguments on.
        others: Arguments that do not change the result; see `HARMLESS`.

    Returns:
        [1, tokens, num_heads, value_dim], and None for the weights.

    Raises:
        UnsupportedModelError: The family asks for something that the kernels do not support.
    """
    query, key, value = lowered(query, key, value)
    latents: LatentLayer | None = getattr(module, "_paged_latents", None)
    # Not `is_compiling()`, which is true in every thread while any thread compiles.
    if torch.compiler.is_dynamo_compiling():
        if latents is not None:
            return _traced_latents(module, latents, query, key, scaling, softcap, s_aux), None
        return _traced(module, query, key, value, scaling, softcap, s_aux), None
    call = paged if paged is not None else _active.call
    if call is None:
        raise RuntimeError(
            f"attention implementation {NAME!r} works only inside the engine of hf_async_batching; "
            "set `attn_implementation` to 'sdpa' or 'eager' for a plain forward"
        )
    if attention_mask is not None:
        raise UnsupportedModelError(f"{type(module).__name__} builds its own attention mask, which is not served")
    refuse_unknown(module, others)
    layer = call.layers[id(module)]
    options = AttentionOptions(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        sliding_window=layer.sliding_window,
        softcap=softcap,
        chunk=layer.chunk,
        sinks=s_aux,
    )
    # The batch dimension is 1: packed tokens take its place.
    if latents is not None:
        kept, queries = latents.take(key), query[0].transpose(0, 1)
        return call.attend_latents(queries, kept, latents.weight, latents.plain, layer.index, options)[None], None
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = call.attend(query, key, value, layer.index, options)
    return out[None], None


def _traced(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    out: torch.Tensor = torch.ops.hf_async_batching.attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        module._paged_tag,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        module._paged_window,
        softcap or 0.0,
        sinks,
    )
    return out[None]


def _traced_latents(
    module: Any,
    latents: LatentLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    out: torch.Tensor = torch.ops.hf_async_batching.latent_attention(
        query[0].transpose(0, 1),
        latents.take(key),
        latents.weight,
        latents.plain,
        module._paged_tag,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        module._paged_window,
        softcap or 0.0,
        sinks,
    )
    return out[None]


AttentionInterface.register(NAME, paged_attention_forward)
