"""Inputs of a model's forward for one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from hf_async_batching.attention.base import AttentionContext


class PromptPiece(NamedTuple):
    """A part of a prompt of embeddings, and its place in a step.

    Attributes:
        start: Index of its first token in the step.
        embeddings: [length, hidden], in place of the token ids.
        positions: int64 [dims, length], in place of the numbers of tokens; None for these numbers.
        layers: One [length, hidden] for each of the first layers, which is added to the layer's output; empty for most
            models.
        merged: See `MediaInputs.merged`.
    """

    start: int
    embeddings: torch.Tensor
    positions: torch.Tensor | None = None
    layers: tuple[torch.Tensor, ...] = ()
    merged: bool = False


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The tokens of one step, packed one after another.

    Attributes:
        token_ids: int64 [tokens].
        position_ids: int64 [tokens], number of tokens of the row before each token.
        sample_index: int64 [sampled], indices of the tokens whose logits are wanted; None for all tokens.
        context: Rows, pages and lengths for the attention.
        embeddings: Pieces of prompts of embeddings.
        rope_positions: int64 [dims, tokens], for a model whose positions have several dimensions; None if they equal
            `position_ids` in all dimensions.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    sample_index: torch.Tensor | None
    context: AttentionContext
    embeddings: tuple[PromptPiece, ...] = ()
    rope_positions: torch.Tensor | None = None
