"""Checks of what transformers has prepared for a `custom_generate` callable: nothing in it may be silently ignored."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteriaList

from hf_async_batching.errors import UnsupportedArgumentError

_PLAIN = "use plain `model.generate` for this call"

_CRITERIA = {"MaxLengthCriteria": ("max_length",), "EosTokenCriteria": ()}

# Inputs of the model's forward that leave the outputs as they are.
_NEUTRAL_INPUTS = {"use_cache", "logits_to_keep", "return_dict"}


def check_criteria(criteria: StoppingCriteriaList, config: GenerationConfig) -> None:
    """Refuse stopping criteria beyond those that the config's own fields ask for.

    Raises:
        UnsupportedArgumentError: Names the class.
    """
    for criterion in criteria:
        name = type(criterion).__name__
        own = type(criterion).__module__.startswith("transformers.")
        if not own or name not in _CRITERIA:
            raise UnsupportedArgumentError(
                f"`stopping_criteria`: {name} is not served yet; submit to a GenerationManager and cancel the request "
                f"when your criterion holds, or {_PLAIN}"
            )
        for attribute in _CRITERIA[name]:
            if getattr(criterion, attribute) != getattr(config, attribute):
                raise UnsupportedArgumentError(
                    f"`stopping_criteria`: {name} has {attribute}={getattr(criterion, attribute)}, the generation "
                    f"config says {getattr(config, attribute)}; pass `{attribute}` to generate instead"
                )
        tokens: Any = getattr(criterion, "eos_token_id", None)
        if tokens is not None and set(tokens.tolist()) != set(_as_list(config._eos_token_tensor)):
            raise UnsupportedArgumentError(
                "`stopping_criteria`: EosTokenCriteria has other tokens than `eos_token_id`; "
                "pass `eos_token_id` to generate instead"
            )


def check_model_inputs(model_kwargs: dict[str, Any], input_ids: torch.Tensor) -> torch.Tensor | None:
    """Refuse inputs of the forward beyond token ids and their mask; returns the mask [batch, length] or None.

    Raises:
        UnsupportedArgumentError: Names the input.
    """
    mask: torch.Tensor | None = model_kwargs.get("attention_mask")
    # Embeddings first: where they take the place of token ids, nothing else has its usual shape.
    for name, value in sorted(model_kwargs.items(), key=lambda item: item[0] != "inputs_embeds"):
        if value is None or name == "attention_mask" or name in _NEUTRAL_INPUTS:
            continue
        if name == "position_ids" and (mask is None or mask.shape == input_ids.shape):
            if value.shape[-1] == input_ids.shape[1] and _are_default_positions(value, mask, input_ids):
                continue
            raise UnsupportedArgumentError(f"custom `position_ids` are not served; leave them out, or {_PLAIN}")
        if name in ("past_key_values", "cache_params") and _is_empty(value):
            continue
        raise UnsupportedArgumentError(f"`{name}` is not served; leave it out, or {_PLAIN}")
    if mask is not None and mask.shape != input_ids.shape:
        raise UnsupportedArgumentError(
            f"`attention_mask` of shape {tuple(mask.shape)} for `input_ids` of shape {tuple(input_ids.shape)} is not "
            f"served; {_PLAIN}"
        )
    return mask


def _are_default_positions(positions: torch.Tensor, mask: torch.Tensor | None, input_ids: torch.Tensor) -> bool:
    """Whether positions are what `generate` makes itself: they count the tokens that the mask keeps.

    Positions of padding do not matter.
    """
    if mask is None:
        return bool((positions == torch.arange(input_ids.shape[1], device=positions.device)).all())
    return bool(((positions == mask.long().cumsum(-1) - 1) | (mask == 0)).all())


def _as_list(tokens: torch.Tensor | None) -> list[int]:
    return [] if tokens is None else tokens.tolist()


def _is_empty(cache: Any) -> bool:
    length = getattr(cache, "get_seq_length", None)
    return length is not None and int(length()) == 0
