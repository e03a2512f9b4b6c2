"""The columns that a run adds: their names, their types, and their values from finished rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_async_batching.dataset.rows.row import Completion, RowResult

COLUMNS = {
    "text": "completion",
    "token_ids": "completion_ids",
    "finish_reason": "finish_reason",
    "prompt_tokens": "prompt_tokens",
    "completion_tokens": "completion_tokens",
    "logprobs": "completion_logprobs",
    "error": "error",
}
"""Each value that a run adds to a row, and the default name of its column."""

_OF_ROWS = ("prompt_tokens", "error")


class OutputColumns:
    """Turns results into columns.

    With one completion per row, a column holds one value; with several, a list of values in the completions' order.
    Failed rows have None.

    Args:
        names: From the key of a value to its column's name; None leaves the column out.
        several: Whether rows have several completions.
        text: Whether rows have texts.
        logprobs: Whether rows have log-probabilities.

    Attributes:
        names: From the key of a value to its column's name, for the columns of this run.
    """

    def __init__(
        self, names: Mapping[str, str | None] | None = None, *, several: bool, text: bool, logprobs: bool
    ) -> None:
        unknown = set(names or ()) - COLUMNS.keys()
        if unknown:
            raise ValueError(f"`output_columns` has no {sorted(unknown)}; its keys are {', '.join(COLUMNS)}")
        chosen: dict[str, str | None] = {**COLUMNS, **(names or {})}
        absent = {"text": not text, "logprobs": not logprobs}
        self.names: dict[str, str] = {
            what: name for what, name in chosen.items() if name is not None and not absent.get(what, False)
        }
        if len(set(self.names.values())) != len(self.names):
            raise ValueError(f"`output_columns` names one column twice: {self.names}")
        self._several = several

    def check(self, column_names: Sequence[str]) -> None:
        """Refuse names of columns that the dataset has already.

        Raises:
            ValueError: The dataset has a column of this name; the message names the column and the remedy.
        """
        for what, name in self.names.items():
            if name in column_names:
                raise ValueError(
                    f"the dataset has a column {name!r} already; pass output_columns={{{what!r}: 'another name'}}, or "
                    "None instead of a name to leave it out"
                )

    def features(self) -> dict[str, Any]:
        """Return the types of the columns, for `datasets.Features`."""
        from datasets import List, Value

        kinds = {
            "text": Value("string"),
            "token_ids": List(Value("int32")),
            "finish_reason": Value("string"),
            "prompt_tokens": Value("int32"),
            "completion_tokens": Value("int32"),
            "logprobs": List(Value("float32")),
            "error": Value("string"),
        }
        several = self._several
        return {
            name: List(kinds[what]) if several and what not in _OF_ROWS else kinds[what]
            for what, name in self.names.items()
        }

    def row(self, result: RowResult) -> dict[str, Any]:
        """Return the values of one row."""
        return {name: self._value(what, result) for what, name in self.names.items()}

    def arrays(self, results: Sequence[RowResult]) -> dict[str, Any]:
        """Return the columns of several rows, as `pyarrow` arrays."""
        import pyarrow as pa

        columns = {}
        for (what, name), feature in zip(self.names.items(), self.features().values()):
            values = [self._value(what, result) for result in results]
            # Arrow copies a NumPy array at once, but reads a list number by number.
            if what in ("token_ids", "logprobs"):
                dtype = np.int32 if what == "token_ids" else np.float32
                values = [_as_numpy(value, dtype, self._several) for value in values]
            columns[name] = pa.array(values, type=_arrow_type(feature))
        return columns

    def _value(self, what: str, result: RowResult) -> Any:
        if what == "error":
            return _storable(result.error)
        if what == "prompt_tokens":
            return result.prompt_tokens
        if result.error is not None:
            return None
        values = [_of_completion(what, completion) for completion in result.completions]
        return values if self._several else values[0]


def _of_completion(what: str, completion: Completion) -> Any:
    if what == "completion_tokens":
        return len(completion.token_ids)
    value = getattr(completion, what)
    return _storable(value) if what == "text" else value


def _storable(text: str | None) -> str | None:
    """Replace halves of surrogate pairs in a text, which Arrow cannot store."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def _as_numpy(value: Any, dtype: Any, several: bool) -> Any:
    if value is None:
        return None
    return [np.asarray(one, dtype) for one in value] if several else np.asarray(value, dtype)


def _arrow_type(feature: Any) -> Any:
    from datasets.features.features import get_nested_type

    return get_nested_type(feature)
