"""What a caller gives as a prompt: token ids in any of the usual forms, or embeddings in their place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch

PromptIds = list[int] | torch.Tensor | np.ndarray[Any, Any]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of one request.

    Attributes:
        tokens: Token ids that the engine computes; placeholders where only embeddings are given.
        shown: Token ids as logits processors see them, padding included; empty where only embeddings are given.
        embeddings: Floating point [length, hidden] in place of the token ids; None where these are looked up.
    """

    tokens: list[int]
    shown: list[int]
    embeddings: torch.Tensor | None = None


def read_prompt(input_ids: PromptIds | None, inputs_embeds: torch.Tensor | None) -> Prompt:
    """The prompt of one `submit` call.

    Args:
        input_ids: Token ids; None only with `inputs_embeds`.
        inputs_embeds: Floating point [length, hidden], which is copied, or None.

    Raises:
        ValueError: Neither is given, they do not fit together, or the ids are no whole numbers.
    """
    if inputs_embeds is None:
        if input_ids is None:
            raise ValueError("submit() needs `input_ids` or `inputs_embeds`")
        tokens = _token_list(input_ids)
        return Prompt(tokens, tokens)
    if not isinstance(inputs_embeds, torch.Tensor) or inputs_embeds.dim() != 2:
        raise ValueError(f"`inputs_embeds` of a prompt must be a tensor [length, hidden], got {_shape(inputs_embeds)}")
    embeddings = inputs_embeds.detach().clone()
    if input_ids is None:
        return Prompt([0] * len(embeddings), [], embeddings)
    tokens = _token_list(input_ids)
    if len(tokens) != len(embeddings):
        raise ValueError(
            f"`inputs_embeds` has {len(embeddings)} positions and `input_ids` {len(tokens)} tokens; pass as many "
            "of one as of the other, or leave `input_ids` out"
        )
    return Prompt(tokens, tokens, embeddings)


def _token_list(input_ids: PromptIds) -> list[int]:
    if isinstance(input_ids, (torch.Tensor, np.ndarray)):
        dtype: Any = input_ids.dtype
        whole = dtype in _INTEGERS if isinstance(dtype, torch.dtype) else np.issubdtype(dtype, np.integer)
        if input_ids.ndim != 1 or not whole:
            raise ValueError(
                "`input_ids` must be a 1-D integer tensor or array, or a list of ints, got "
                f"{_shape(input_ids)}; submit the rows of a batch one by one, without their padding"
            )
        tokens: list[int] = input_ids.tolist()
        return tokens
    if isinstance(input_ids, Iterable) and not isinstance(input_ids, (str, bytes)):
        prompt = list(input_ids)
        if all(isinstance(token, Integral) for token in prompt):
            return [int(token) for token in prompt]
    raise ValueError("`input_ids` must be a 1-D integer tensor or array, or a list of ints; tokenize text first")


def _shape(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"shape {tuple(shape)} and dtype {value.dtype}"
