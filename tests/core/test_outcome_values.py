"""What an outcome says, at the bounds of its kinds."""

from __future__ import annotations

import pytest

from hf_async_batching.core.outcomes import (
    FIRST_UNSOUND,
    UNDRAWABLE,
    UNDRAWABLE_UNSOUND,
    is_marked,
    is_undrawable,
    is_unsound,
    token_of,
)


@pytest.mark.parametrize(
    ("outcome", "marked", "undrawable", "unsound", "token"),
    [
        (1, False, False, False, 1),
        (0, False, False, False, 0),
        (UNDRAWABLE, True, True, False, 0),
        (UNDRAWABLE_UNSOUND, True, True, True, 0),
        (FIRST_UNSOUND, True, False, True, 0),
        (FIRST_UNSOUND - 1, True, False, True, 1),
        (FIRST_UNSOUND - 70, True, False, True, 70),
    ],
)
def test_an_outcome_is_a_token_or_a_reason(
    outcome: int, marked: bool, undrawable: bool, unsound: bool, token: int
) -> None:
    assert is_marked(outcome) == marked
    assert is_undrawable(outcome) == undrawable
    assert is_unsound(outcome) == unsound
    assert token_of(outcome) == token
