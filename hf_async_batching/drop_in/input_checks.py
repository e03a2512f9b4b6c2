"""Check the inputs that transformers has prepared for a `custom_generate` callable; none is silently ignored."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from hf_async_batching.errors import UnsupportedArgumentError
from hf_async_batching.inputs.media_arguments import CACHES, TOKEN_TYPES, is_media
from hf_async_batching.model.small.length_thresholds import length_thresholds

_PLAIN = "use plain `model.generate` for this call"

# Inputs of the model's forward that do not change the outputs.
_NEUTRAL_INPUTS = {"use_cache", "logits_to_keep", "return_dict"}


def check_model_inputs(
    model_kwargs: dict[str, Any],
    input_ids: torch.Tensor,
    zeros_are_neutral: Callable[[str], bool] = lambda name: False,  # noqa: ARG005
    media: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Refuse inputs of the forward beyond token ids, their embeddings and their mask.

    Args:
        model_kwargs: All inputs of the forward.
        input_ids: The prompts [batch, length].
        zeros_are_neutral: Whether an input that is all zeros changes nothing; called only for token types.
        media: Whether pictures, videos or sounds, and what belongs to them, are looked at elsewhere.

    Returns:
        The mask [batch, length] or None, and the embeddings [batch, length, hidden] or None.

    Raises:
        UnsupportedArgumentError: An input is not served; the message names it.
    """
    mask: torch.Tensor | None = model_kwargs.get("attention_mask")
    embeddings: torch.Tensor | None = model_kwargs.get("inputs_embeds")
    shape = input_ids.shape
    if embeddings is not None:
        shape = embeddings.shape[:2]
        if input_ids.shape[1] and input_ids.shape != shape:
            raise UnsupportedArgumentError(
                f"`inputs_embeds` of shape {tuple(embeddings.shape)} beside `input_ids` of shape "
                f"{tuple(input_ids.shape)} is not served; leave `input_ids` out, or {_PLAIN}"
            )
    for name, value in model_kwargs.items():
        if value is None or name in ("attention_mask", "inputs_embeds") or name in _NEUTRAL_INPUTS:
            continue
        if media and (is_media(name) or name in TOKEN_TYPES or (name == "position_ids" and value.dim() == 3)):
            continue
        if name == "position_ids" and (mask is None or mask.shape == shape):
            if value.shape[-1] == shape[1] and _are_default_positions(value, mask, shape[1]):
                continue
            raise UnsupportedArgumentError(f"custom `position_ids` are not served; leave them out, or {_PLAIN}")
        if name in CACHES:
            if _is_plain(value) and _is_empty(value):
                continue
            raise UnsupportedArgumentError(
                f"`{name}` is not served where it holds tokens, or where its class is not one that keeps keys and "
                f"values as they are (got {type(value).__name__}); leave it out, or {_PLAIN}"
            )
        if name in TOKEN_TYPES and not bool(torch.as_tensor(value).any()) and zeros_are_neutral(name):
            continue
        if name == "mm_encoder_outputs" and not value:  # without an image
            continue
        raise UnsupportedArgumentError(f"`{name}` is not served; leave it out, or {_PLAIN}")
    if mask is not None and mask.shape != shape:
        raise UnsupportedArgumentError(
            f"`attention_mask` of shape {tuple(mask.shape)} for `input_ids` of shape {tuple(shape)} is not "
            f"served; {_PLAIN}"
        )
    return mask, embeddings


def _are_default_positions(positions: torch.Tensor, mask: torch.Tensor | None, length: int) -> bool:
    """Whether positions are those that `generate` makes itself: they count the tokens that the mask keeps.

    Positions of padding do not matter.
    """
    if mask is None:
        return bool((positions == torch.arange(length, device=positions.device)).all())
    return bool(((positions == mask.long().cumsum(-1) - 1) | (mask == 0)).all())


def _is_plain(cache: Any) -> bool:
    """Whether a cache stores its input unchanged, as the engine's pages do, by its exact class and its layers.

    A subclass, or layers that quantize, may compute something else.
    """
    kind = type(cache)
    if kind is EncoderDecoderCache:
        return _is_plain(cache.self_attention_cache)
    package, _, rest = kind.__module__.partition(".")
    of_a_family = package == "transformers_modules" or (package == "transformers" and rest.startswith("models."))
    layers = getattr(cache, "layers", ())
    return (kind in (DynamicCache, StaticCache) or of_a_family) and all(
        type(layer).__module__.partition(".")[0] in ("transformers", "transformers_modules")
        and "Quantized" not in type(layer).__name__
        for layer in layers
    )


def _is_empty(cache: Any) -> bool:
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    layers = getattr(cache, "layers", None)
    if layers is None:
        length = getattr(cache, "get_seq_length", None)
        return length is not None and int(length()) == 0
    # Layers with only states have no length.
    return not any(_holds_tokens(layer) for layer in layers)


def _holds_tokens(layer: Any) -> bool:
    states: Any = getattr(layer, "has_previous_state", {})
    if any(states.values()) if isinstance(states, dict) else states:
        return True
    return isinstance(layer, CacheLayerMixin) and int(layer.get_seq_length()) > 0


def check_mask(mask: torch.Tensor, model: PreTrainedModel) -> None:
    """Refuse masks that express more than padding on the left.

    Zeros after the last token are not padding for `generate`: it computes the first new token from the last position,
    whatever is there. Hidden tokens between others keep their positions. This makes no difference to full attention
    over positions, but it does to windows, convolutions and states.

    Args:
        mask: [batch, length], of any dtype.
        model: The model of the call.

    Raises:
        UnsupportedArgumentError: The mask is not served; the message names the reason.
    """
    shown = mask != 0
    if not bool(((mask == 1) | ~shown).all()):
        raise UnsupportedArgumentError(
            f"`attention_mask` with other values than 0 and 1 is not served; pass zeros and ones, or {_PLAIN}"
        )
    behind = shown.any(-1) & ~shown[:, -1:].all(-1)
    if bool(behind.any()):
        raise UnsupportedArgumentError(
            f"`attention_mask` with zeros behind the last token (row {int(behind.nonzero()[0])}; without a mask "
            "`generate` makes one that hides pad tokens) is not served: `generate` goes on behind the padding there. "
            f'Pad on the left (`tokenizer.padding_side = "left"`), or {_PLAIN}'
        )
    between = ~shown & (shown.long().cumsum(-1) > 0)
    if bool(between.any()) and not _counts_positions(model):
        raise UnsupportedArgumentError(
            f"`attention_mask` with zeros between tokens is not served for {type(model).__name__}, whose layers see "
            f"the places of hidden tokens; leave these tokens out, or {_PLAIN}"
        )


def _counts_positions(model: PreTrainedModel) -> bool:
    """Whether all layers attend to all tokens, and token positions come only from `position_ids`."""
    layers = DynamicCache(config=model.config).layers
    alone = "position_ids" in inspect.signature(model.forward).parameters
    # The cache's layers know which of them have a `sliding_window`, but they do not know GPT-Neo's `window_size`.
    windows = [name for name in length_thresholds(model.config) if not name.startswith("rope_")]
    others = any(not name.endswith("sliding_window") for name in windows)
    return alone and not others and bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
