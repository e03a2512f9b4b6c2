"""Checks of what transformers has prepared for a `custom_generate` callable: nothing in it may be silently ignored."""

from __future__ import annotations

from typing import Any

import torch

from hf_async_batching.errors import UnsupportedArgumentError

_PLAIN = "use plain `model.generate` for this call"

# Inputs of the model's forward that leave the outputs as they are.
_NEUTRAL_INPUTS = {"use_cache", "logits_to_keep", "return_dict"}


def check_model_inputs(
    model_kwargs: dict[str, Any], input_ids: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Refuse inputs of the forward beyond token ids, their embeddings and their mask.

    Returns:
        The mask [batch, length] or None, and the embeddings [batch, length, hidden] or None.

    Raises:
        UnsupportedArgumentError: Names the input.
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
        if name == "position_ids" and (mask is None or mask.shape == shape):
            if value.shape[-1] == shape[1] and _are_default_positions(value, mask, shape[1]):
                continue
            raise UnsupportedArgumentError(f"custom `position_ids` are not served; leave them out, or {_PLAIN}")
        if name in ("cache", "past_key_values", "cache_params") and _is_empty(value):
            continue
        if name == "mm_encoder_outputs" and not value:  # of no image
            continue
        raise UnsupportedArgumentError(f"`{name}` is not served; leave it out, or {_PLAIN}")
    if mask is not None and mask.shape != shape:
        raise UnsupportedArgumentError(
            f"`attention_mask` of shape {tuple(mask.shape)} for `input_ids` of shape {tuple(shape)} is not "
            f"served; {_PLAIN}"
        )
    return mask, embeddings


def _are_default_positions(positions: torch.Tensor, mask: torch.Tensor | None, length: int) -> bool:
    """Whether positions are what `generate` makes itself: they count the tokens that the mask keeps.

    Positions of padding do not matter.
    """
    if mask is None:
        return bool((positions == torch.arange(length, device=positions.device)).all())
    return bool(((positions == mask.long().cumsum(-1) - 1) | (mask == 0)).all())


def _is_empty(cache: Any) -> bool:
    length = getattr(cache, "get_seq_length", None)
    return length is not None and int(length()) == 0
