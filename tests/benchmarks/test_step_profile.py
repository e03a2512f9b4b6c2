"""A kernel's share of a step counts from the end of the kernel before it."""

from __future__ import annotations

import pytest

from benchmarks.step_profile import Share, Span, by_name


def test_kernels_that_overlap_count_once_and_gaps_are_told_apart() -> None:
    spans = [Span("b", 2, 14), Span("a", 0, 10), Span("a", 20, 25), Span("c", 21, 24)]
    shares = by_name(spans)
    assert shares["a"] == Share(total=10 + 1, gap=0, own=15, launches=2)
    assert shares["b"] == Share(total=4, gap=0, own=12, launches=1)
    assert shares["c"] == Share(total=10, gap=7, own=3, launches=1)
    assert sum(share.total for share in shares.values()) == pytest.approx(25)


def test_no_kernel_at_all() -> None:
    assert by_name([]) == {}
