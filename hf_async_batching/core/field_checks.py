"""Check a request's fields; messages name the field. No torch."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from hf_async_batching.core.row_layout import MAX_INT32


def check_integer(name: str, value: Any, least: int = 0, most: int = MAX_INT32) -> None:
    """Refuse a value that is not an integer from `least` to `most`.

    Raises:
        TypeError: The value is not an integer.
        ValueError: The value is out of range.
    """
    if not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer, got {value!r}")
    if not least <= value <= most:  # type: ignore[operator]
        raise ValueError(f"`{name}` must be from {least} to {most}, got {value}")


def check_real(name: str, value: Any) -> None:
    """Refuse a value that is not a real number; NaN and infinities pass.

    Raises:
        TypeError: The value is not a number.
    """
    if not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {value!r}")


def check_length(name: str, value: Any) -> None:
    """Refuse a value that is not a number of tokens; `generate` accepts fractions.

    Raises:
        TypeError: The value is not a number.
        ValueError: The value is not finite.
    """
    check_real(name, value)
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}")
