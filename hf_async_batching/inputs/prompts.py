"""Read a prompt: a text, token ids in any of the usual forms, or embeddings in their place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch

from hf_async_batching.runtime.forking import ForkSafeLock

PromptIds = str | Sequence[int] | torch.Tensor | np.ndarray[Any, Any]

_INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)

# A fast tokenizer writes its settings into itself in each call, which two threads must not do at once.
_tokenizing = ForkSafeLock()


@dataclass(frozen=True, slots=True)
class MediaInputs:
    """What the layers read of one prompt in place of its token ids.

    Attributes:
        embeddings: Floating point [length, hidden].
        positions: int64 [dims, length], for models whose positions have several dimensions; None for the usual ones.
        layers: One [length, hidden] for each of the first layers, which is added to the layer's output.
        merged: Whether the model's own code has made the embeddings from token ids with placeholders; then it embeds
            the step's other tokens too.
    """

    embeddings: torch.Tensor
    positions: torch.Tensor | None = None
    layers: tuple[torch.Tensor, ...] = ()
    merged: bool = False

    @classmethod
    def of(cls, given: Any) -> MediaInputs:
        """The value of `Request.prompt_embeddings`, which can be embeddings alone."""
        return given if isinstance(given, cls) else cls(given)

    def to(self, device: torch.device) -> MediaInputs:
        """The same on another device."""
        positions = None if self.positions is None else self.positions.to(device)
        layers = tuple(layer.to(device) for layer in self.layers)
        return MediaInputs(self.embeddings.to(device), positions, layers, self.merged)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of one request.

    Attributes:
        tokens: Token ids that the engine computes; placeholders if only embeddings are given.
        shown: Token ids as logits processors see them, padding included; empty if only embeddings are given.
        embeddings: Floating point [length, hidden] in place of the token ids, or `MediaInputs`; None if the ids are
            looked up.
        shifts: See `Request.position_shifts`.
        keys: See `Request.prefix_keys`.
    """

    tokens: list[int]
    shown: list[int]
    embeddings: torch.Tensor | MediaInputs | None = None
    shifts: tuple[int, ...] = ()
    keys: tuple[int, ...] | None = None


def read_prompt(input_ids: PromptIds | None, inputs_embeds: torch.Tensor | None, tokenizer: Any = None) -> Prompt:
    """The prompt of one `submit` call.

    Args:
        input_ids: A text; or token ids: a list, or an integer tensor or array [length] or [1, length]. None only with
            `inputs_embeds`.
        inputs_embeds: Floating point [length, hidden], which is copied, or None.
        tokenizer: For a text.

    Raises:
        ValueError: Neither is given, they do not fit together, the ids are not integers or hold several prompts, or a
            text has no tokenizer.
    """
    if isinstance(input_ids, str):
        input_ids = _tokenized(input_ids, tokenizer)
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


def _tokenized(text: str, tokenizer: Any) -> list[int]:
    """The token ids that the tokenizer makes of a text by default, special tokens included."""
    if tokenizer is None:
        raise ValueError(
            "`input_ids` is a text, and there is no `tokenizer` to tokenize it; pass tokenizer=... to "
            "GenerationManager or to submit(), or submit tokenizer(text).input_ids"
        )
    with _tokenizing:
        tokens: list[int] = tokenizer(text)["input_ids"]
    return tokens


def _token_list(input_ids: PromptIds) -> list[int]:
    if isinstance(input_ids, (torch.Tensor, np.ndarray)):
        dtype: Any = input_ids.dtype
        whole = dtype in _INTEGERS if isinstance(dtype, torch.dtype) else np.issubdtype(dtype, np.integer)
        if input_ids.ndim == 2 and len(input_ids) == 1:
            input_ids = input_ids[0]
        if input_ids.ndim == 2:
            raise ValueError(
                f"`input_ids` has {_shape(input_ids)}: submit() takes one prompt; submit each row without its "
                "padding, or call hf_async_batching.generate with the batch"
            )
        if input_ids.ndim != 1 or not whole:
            raise ValueError(
                "`input_ids` must be a 1-D integer tensor or array, a list of ints or a text, got "
                f"{_shape(input_ids)}; submit the rows of a batch one by one, without their padding"
            )
        tokens: list[int] = input_ids.tolist()
        return tokens
    if isinstance(input_ids, Mapping):
        raise ValueError("`input_ids` is a mapping, such as a tokenizer returns; submit its entry `input_ids`")
    if isinstance(input_ids, Iterable) and not isinstance(input_ids, (str, bytes)):
        prompt = list(input_ids)
        if all(isinstance(token, Integral) for token in prompt):
            return [int(token) for token in prompt]
        if all(isinstance(message, Mapping) for message in prompt):
            raise ValueError(
                "`input_ids` holds messages; submit what "
                "tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) returns"
            )
    raise ValueError("`input_ids` must be a 1-D integer tensor or array, a list of ints or a text")


def _shape(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"shape {tuple(shape)} and dtype {value.dtype}"
