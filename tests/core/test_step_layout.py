"""Sizes of the sections of a step's inputs, and where they begin."""

from __future__ import annotations

from hf_async_batching.core.row_layout import PARAMS
from hf_async_batching.core.step_layout import NO_PADDING, Padding, Sections


def test_sections_lie_behind_each_other() -> None:
    sections = Sections(2, 3, 5, 7, 11, 13, 17, given=19)
    assert sections.writes_start == 2 * (1 + PARAMS) + 3 * 3
    assert sections.given_start == sections.writes_start + 17 * 3
    assert sections.updates_end == sections.given_start + 19 * 2
    assert sections.total == sections.updates_end + 5 + 7 * 3 + 11 + 13 * 4
    assert Sections().total == NO_PADDING.sections.total == 0


def test_what_a_step_was_padded_to_follows_from_its_sections() -> None:
    padding = Padding(32, 16, 8)
    assert padding.sections == Sections(tokens=32, samples=24, tiles=24, decodes=8)
    assert padding.sections.padding == padding


def test_the_largest_step() -> None:
    largest = Sections.largest(max_rows=4, max_batch_tokens=64, num_pages=9, writes=100, drafted=6)
    assert largest == Sections(4, 9, 4, 64, 10, 68, 100, given=4)
