"""The columns that a run adds: which, of what types, and with what values."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Features, List, Value

from hf_async_batching.dataset.rows.output_columns import COLUMNS, OutputColumns
from hf_async_batching.dataset.rows.row import Completion, RowResult

ALL: dict[str, Any] = {"text": True, "logprobs": True}
FIRST = Completion([5, 6, 7], "eos", [-0.5, -1.0, -2.0], "abc")
SECOND = Completion([8], "length", [-0.25], "d\ud800")
FAILED = RowResult(1, None, error="bad \ud800")


def test_a_column_for_each_value_that_there_is() -> None:
    assert OutputColumns(several=False, **ALL).names == COLUMNS
    assert COLUMNS.keys() - OutputColumns(several=False, text=False, logprobs=True).names.keys() == {"text"}
    assert COLUMNS.keys() - OutputColumns(several=False, text=True, logprobs=False).names.keys() == {"logprobs"}
    changed = OutputColumns({"text": "reply", "error": None}, several=False, **ALL).names
    assert changed == {**{what: name for what, name in COLUMNS.items() if what != "error"}, "text": "reply"}


def test_names_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has no \['texts'\]; its keys are text, token_ids"):
        OutputColumns({"texts": "a", "text": "b"}, several=False, **ALL)
    with pytest.raises(ValueError, match="names one column twice"):
        OutputColumns({"text": "error"}, several=False, **ALL)
    OutputColumns({"text": "completion_logprobs"}, several=False, text=True, logprobs=False)
    columns = OutputColumns({"text": "reply"}, several=False, **ALL)
    columns.check(["prompt", "completion"])
    with pytest.raises(
        ValueError, match=r"has a column 'reply' already; pass output_columns=\{'text': 'another name'\}"
    ):
        columns.check(["prompt", "reply"])


@pytest.mark.parametrize("several", [False, True])
def test_types_and_values(several: bool) -> None:
    columns = OutputColumns(several=several, **ALL)
    done = RowResult(0, 4, [FIRST, SECOND] if several else [FIRST])
    plain = {
        "completion": ["abc", "d\\ud800"],
        "completion_ids": [[5, 6, 7], [8]],
        "finish_reason": ["eos", "length"],
        "completion_tokens": [3, 1],
        "completion_logprobs": [[-0.5, -1.0, -2.0], [-0.25]],
    }
    expected: dict[str, Any] = {name: values if several else values[0] for name, values in plain.items()}
    assert columns.row(done) == {**expected, "prompt_tokens": 4, "error": None}
    nothing = {**dict.fromkeys(expected), "prompt_tokens": None, "error": "bad \\ud800"}
    assert columns.row(FAILED) == nothing
    features = columns.features()
    wrap = List if several else lambda kind: kind
    assert features["completion"] == features["finish_reason"] == wrap(Value("string"))
    assert features["completion_ids"] == wrap(List(Value("int32")))
    assert features["completion_tokens"] == wrap(Value("int32"))
    assert (features["prompt_tokens"], features["error"]) == (Value("int32"), Value("string"))
    assert features["completion_logprobs"] == wrap(List(Value("float32")))
    arrays = columns.arrays([done, FAILED])
    assert {name: array.to_pylist() for name, array in arrays.items()} == {
        name: [value, nothing[name]] for name, value in columns.row(done).items()
    }
    assert {name: array.type for name, array in arrays.items()} == {
        field.name: field.type for field in Features(features).arrow_schema
    }
