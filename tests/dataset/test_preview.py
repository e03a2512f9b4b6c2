"""The first rows of a finished dataset, as a person sees them."""

from __future__ import annotations

from hf_async_batching.dataset.preview import preview


def test_three_rows_in_two_lines_each() -> None:
    rows = [{"p": f"question {i}\n  over lines", "c": "x" * 300} for i in range(5)]
    lines = preview(rows, "p", "c").splitlines()
    assert lines[0] == "row 0, p: question 0 over lines"
    assert lines[1] == "row 0, c: " + "x" * 99 + "…"
    assert len(lines) == 6


def test_rows_of_every_kind() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = [{"p": messages, "c": ["first", "second"]}, {"p": [5, 6], "c": None, "error": "too long"}, {"q": 1}]
    assert preview(rows, "p", "c").splitlines() == [
        "row 0, p: Hi",
        "row 0, c: first",
        "row 1, p: [5, 6]",
        "row 1, error: too long",
    ]


def test_a_text_of_a_hundred_letters_is_shown_whole() -> None:
    rows = [{"p": "x" * 100}, {"p": "y" * 101}, {"p": []}, {"p": "z"}]
    assert preview(rows, "p", "c").splitlines() == [f"row 0, p: {'x' * 100}", f"row 1, p: {'y' * 99}…", "row 2, p: []"]
