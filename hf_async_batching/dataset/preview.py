"""Shows the first rows of a finished dataset in a few lines, so that users see at once whether they make sense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

_ROWS = 3
_WIDTH = 100


def preview(rows: Any, prompt: str, completion: str) -> str:
    """Write prompt and completion of the first rows, two lines for each row; empty if a row has neither.

    Args:
        rows: A `Dataset`, or rows as dictionaries.
        prompt: Name of the column of prompts.
        completion: Name of the column of completions.
    """
    lines = []
    for index, row in enumerate(islice(rows, _ROWS)):
        shown = {name: row[name] for name in (prompt, completion) if row.get(name) is not None}
        lines += [f"row {index}, {name}: {_short(value)}" for name, value in shown.items()]
        if row.get("error") is not None:
            lines.append(f"row {index}, error: {_short(row['error'])}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = " ".join(_text(value).split())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def _text(value: Any) -> str:
    """Return the text to show for a value: the last of several messages, or the first of several completions."""
    if isinstance(value, Mapping):
        return _text(value.get("content"))
    if isinstance(value, Sequence) and not isinstance(value, str) and value and not isinstance(value[0], int):
        return _text(value[-1] if isinstance(value[0], Mapping) else value[0])
    return str(value)
