"""Sizes as a person reads them."""

from __future__ import annotations

import pytest

from hf_async_batching.runtime.size_text import size_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (3 << 20, "3.0 MiB"),
        (12 << 30, "12.0 GiB"),
        (3 << 40, "3072.0 GiB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text
