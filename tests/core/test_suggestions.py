"""What a caller may have meant."""

from __future__ import annotations

from hf_async_batching.core.suggestions import did_you_mean


def test_the_nearest_names_are_named_once_each() -> None:
    known = ["max_rows", "max_new_tokens", "depth"]
    assert did_you_mean(["max_row"], known) == "; did you mean `max_rows`?"
    assert did_you_mean(["max_row", "deph", "max_rws"], known) == "; did you mean `max_rows` and `depth`?"
    assert did_you_mean(["quite_else"], known) == ""
