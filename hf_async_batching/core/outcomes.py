"""What becomes of a sampled position, as one integer: a token, or why there is none. No torch.

Whether a draw was possible, and whether the model's logits were finite, is known on the device only. It comes to the
host where the token would stand, so that nothing else is read back. The row tables keep the token (0 where there is
none), which is what steps in flight go on with.
"""

from __future__ import annotations

UNDRAWABLE = -1
"""A draw from scores with NaN or inf, or that are all -inf, over finite logits of the model."""

UNDRAWABLE_UNSOUND = -2
"""A draw from scores of which the model's logits were not finite themselves."""

FIRST_UNSOUND = -3
"""Token t of logits whose largest is NaN or infinite is `FIRST_UNSOUND - t`."""


def is_undrawable(outcome: int) -> bool:
    """Whether there is no token."""
    return UNDRAWABLE_UNSOUND <= outcome <= UNDRAWABLE


def is_unsound(outcome: int) -> bool:
    """Whether the model's logits were not finite, so that what the step wrote for the row must not be used again."""
    return outcome <= UNDRAWABLE_UNSOUND


def token_of(outcome: int) -> int:
    """The token; 0 where there is none."""
    return outcome if outcome >= 0 else max(0, FIRST_UNSOUND - outcome)
