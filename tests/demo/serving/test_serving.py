"""How much memory an engine of the page takes."""

from __future__ import annotations

import pytest

from demo.serving.serving import cpu_cache_share

GIB = 1 << 30


@pytest.mark.parametrize(
    ("weights", "free", "bytes_of_cache"),
    [
        (GIB // 2, 32 * GIB, GIB),
        (GIB // 2, 2 * GIB, GIB // 2),  # never more than a quarter of what is free
        (1 << 20, 32 * GIB, GIB // 4),
        (4 * GIB, 64 * GIB, 8 * GIB),
    ],
)
def test_on_a_cpu_the_cache_is_bounded_by_the_weights(weights: int, free: int, bytes_of_cache: int) -> None:
    assert cpu_cache_share(weights, free) * free == pytest.approx(bytes_of_cache)
