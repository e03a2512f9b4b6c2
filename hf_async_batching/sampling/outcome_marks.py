"""Outcomes (see `outcomes`) on the device."""

from __future__ import annotations

import torch

from hf_async_batching.core.outcomes import FIRST_UNSOUND, UNDRAWABLE, UNDRAWABLE_UNSOUND


def tokens_of(outcomes: torch.Tensor) -> torch.Tensor:
    """Tokens int32 [rows] of outcomes int32 [rows]; 0 if there is no token."""
    return torch.where(outcomes < 0, (FIRST_UNSOUND - outcomes).clamp(min=0), outcomes)


def without_token(outcomes: torch.Tensor) -> torch.Tensor:
    """bool [rows], whether a row has no token."""
    return (outcomes < 0) & (outcomes > FIRST_UNSOUND)


def marked(tokens: torch.Tensor, *, undrawable: torch.Tensor | None = None, unsound: torch.Tensor) -> torch.Tensor:
    """Outcomes int32 [rows] of tokens int32 [rows].

    Args:
        tokens: int32 [rows], the token of each row.
        undrawable: bool [rows], whether a token should be drawn but cannot be.
        unsound: bool [rows], whether the model's logits are not finite.
    """
    outcomes = torch.where(unsound, FIRST_UNSOUND - tokens, tokens)
    if undrawable is not None:
        none = torch.where(unsound, UNDRAWABLE_UNSOUND, UNDRAWABLE).int()
        outcomes = torch.where(undrawable, none, outcomes)
    return outcomes
