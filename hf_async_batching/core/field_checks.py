"""Checks of a request's fields, which name the field; no torch."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from hf_async_batching.core.row_layout import MAX_INT32


def check_integer(name: str, value: Any, least: int = 0, most: int = MAX_INT32) -> None:
    """Refuse a value that is not an integer from `least` to `most`.

    Raises:
        TypeError: It is no integer.
        ValueError: It is out of range.
    """
    if not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer, got {value!r}")
    if not least <= value <= most:  # type: ignore[operator]
        raise ValueError(f"`{name}` must be from {least} to {most}, got {value}")


def check_real(name: str, value: Any) -> None:
    """Refuse a value that is not a real number; NaN and infinities pass.

    Raises:
        TypeError: It is no number.
    """
    if not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {value!r}")


def check_length(name: str, value: Any) -> None:
    """Refuse a value that is not a number of tokens; `generate` takes fractions.

    Raises:
        TypeError: It is no number.
        ValueError: It is not finite.
    """
    check_real(name, value)
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}")
