"""The outcome of a sampled position as one integer: a token, or the reason why there is none. No torch.

Only the device knows whether a draw was possible, and whether the model's logits were finite. The outcome reaches the
host in the place of the token, so nothing else is read back. The row tables keep the token (0 if there is none), from
which steps in flight continue.
"""

from __future__ import annotations

UNDRAWABLE = -1
"""A draw from scores with NaN or inf, or that are all -inf, although the model's logits were finite."""

UNDRAWABLE_UNSOUND = -2
"""A draw from scores whose logits from the model were not finite."""

FIRST_UNSOUND = -3
"""`FIRST_UNSOUND - t` means token t, from logits whose largest is NaN or infinite."""


def is_marked(outcome: int) -> bool:
    """Whether it is anything but a plain token."""
    return outcome < 0


def is_undrawable(outcome: int) -> bool:
    """Whether there is no token."""
    return UNDRAWABLE_UNSOUND <= outcome <= UNDRAWABLE


def is_unsound(outcome: int) -> bool:
    """Whether the model's logits were not finite, so that keys and values which the step wrote must not be reused."""
    return outcome <= UNDRAWABLE_UNSOUND


def token_of(outcome: int) -> int:
    """The token; 0 if there is none."""
    return max(0, FIRST_UNSOUND - outcome) if is_marked(outcome) else outcome
