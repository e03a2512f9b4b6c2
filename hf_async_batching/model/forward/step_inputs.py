"""Inputs of a model's forward for one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_async_batching.attention.base import AttentionContext


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The tokens of one step, packed one after another.

    Attributes:
        token_ids: int64 [tokens].
        position_ids: int64 [tokens].
        sample_index: int64 [sampled], indices of the tokens whose logits are wanted; None for all tokens.
        context: Rows, pages and lengths for the attention.
        embeddings: Prompt embeddings that replace token ids: index of the first token, and [length, hidden].
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    sample_index: torch.Tensor | None
    context: AttentionContext
    embeddings: tuple[tuple[int, torch.Tensor], ...] = ()
