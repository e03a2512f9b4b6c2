"""Checks of what transformers has prepared for a `custom_generate` callable: nothing in it may be silently ignored."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList

from hf_async_batching.errors import UnsupportedArgumentError

_PLAIN = "use plain `model.generate` for this call"

# What the engine does itself, by name of transformers' class: the attributes that must agree with the config.
_PROCESSORS = {
    "TemperatureLogitsWarper": ("temperature",),
    "TopKLogitsWarper": ("top_k",),
    "TopPLogitsWarper": ("top_p",),
    "MinPLogitsWarper": ("min_p",),
    "MinLengthLogitsProcessor": ("min_length",),
    "MinNewTokensLengthLogitsProcessor": ("min_new_tokens",),
    "LogitNormalization": (),
}

# Inputs of the model's forward that leave the outputs as they are.
_NEUTRAL_INPUTS = {"use_cache", "logits_to_keep", "return_dict"}


def check_processors(processors: LogitsProcessorList, config: GenerationConfig) -> None:
    """Refuse processors beyond those that the config's own fields ask for.

    Raises:
        UnsupportedArgumentError: Names the class.
    """
    seen: set[str] = set()
    for processor in processors:
        name = type(processor).__name__
        own = type(processor).__module__.startswith("transformers.")
        if not own or name not in _PROCESSORS:
            raise UnsupportedArgumentError(f"`logits_processor`: {name} is not served yet; {_PLAIN}")
        for attribute in _PROCESSORS[name]:
            if getattr(processor, attribute) != getattr(config, attribute):
                raise UnsupportedArgumentError(
                    f"`logits_processor`: {name} has {attribute}={getattr(processor, attribute)}, the generation "
                    f"config says {getattr(config, attribute)}; pass `{attribute}` to generate instead"
                )
        tokens: Any = getattr(processor, "eos_token_id", None)
        skipped: Any = getattr(processor, "prompt_length_to_skip", None)
        if (
            name in seen  # a warper of the caller's, and behind it the config's own: it would apply twice
            or (tokens is not None and set(tokens.tolist()) != set(_as_list(config._eos_token_tensor)))
            or (skipped is not None and skipped + processor.min_new_tokens != config.min_length)
            or getattr(processor, "min_tokens_to_keep", 1) != 1
            or getattr(processor, "filter_value", float("-inf")) != float("-inf")
        ):
            raise UnsupportedArgumentError(
                f"`logits_processor`: {name} differs from what the generation config makes; pass the fields of the "
                f"config to generate instead, or {_PLAIN}"
            )
        seen.add(name)


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
        if name in ("past_key_values", "cache_params") and _is_empty(value):
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


def _as_list(tokens: torch.Tensor | None) -> list[int]:
    return [] if tokens is None else tokens.tolist()


def _is_empty(cache: Any) -> bool:
    length = getattr(cache, "get_seq_length", None)
    return length is not None and int(length()) == 0
