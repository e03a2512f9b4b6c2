"""From a row's value to the tokens of its prompt."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np
import pytest

from hf_async_batching.dataset.rows.prompts import PromptMaker
from hf_async_batching.dataset.rows.row import PreparedRow, RowBlock

HELLO = {"role": "user", "content": "hello"}


class Tokenizer:
    """One token per letter; it records how it was called."""

    calls: ClassVar[list[Any]] = []

    def __call__(self, texts: list[str], *, return_attention_mask: bool) -> dict[str, Any]:
        assert return_attention_mask is False
        self.calls.append(texts)
        if any("!" in text for text in texts):
            raise ValueError("no ! please")
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    def apply_chat_template(self, messages: Any, **arguments: Any) -> dict[str, Any]:
        assert arguments.pop("tokenize") is True and arguments.pop("return_dict") is True
        self.calls.append((messages, arguments))
        return {"input_ids": [len(messages)]}


@pytest.fixture
def calls() -> list[Any]:
    Tokenizer.calls = []
    return Tokenizer.calls


def make(rows: list[Any], tokenizer: Any = None, parameters: dict[str, str] | None = None, **given: Any) -> Any:
    prompts = PromptMaker(tokenizer or Tokenizer(), given.pop("prompt", "prompt"), parameters or {}, **given)
    rows = [row if isinstance(row, dict) and "prompt" in row else {"prompt": row} for row in rows]
    return prompts(RowBlock(10, rows), range(10, 10 + len(rows)))


def test_texts_are_tokenized_together_and_a_bad_one_alone(calls: list[Any]) -> None:
    assert [row.prompt for row in make(["ab", "c"])] == [[97, 98], [99]]
    assert calls == [["ab", "c"]]
    calls.clear()
    first, bad, last = make(["ab", "!", "c"])
    assert (first.prompt, last.prompt, bad.error) == ([97, 98], [99], "no ! please")
    assert [first.error, last.error] == [None, None]
    assert calls == [["ab", "!", "c"], ["ab"], ["!"], ["c"]]
    calls.clear()
    assert make([[3]])[0].prompt == [3] and not calls, "no text, no call"


def test_only_wanted_rows_are_prepared() -> None:
    rows = [{"prompt": [i]} for i in range(4)]
    prepared = PromptMaker(None, "prompt", {})(RowBlock(10, rows), [11, 13])
    assert prepared == [PreparedRow(11, [1]), PreparedRow(13, [3])]


@pytest.mark.parametrize(
    ("value", "tokens"),
    [([5, 6], [5, 6]), ((5,), [5]), (np.array([7, 8]), [7, 8]), ([np.int64(9)], [9])],
    ids=str,
)
def test_token_ids(value: Any, tokens: list[int]) -> None:
    (row,) = make([value])
    assert row.prompt == tokens and all(type(token) is int for token in row.prompt)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, "the prompt is None (column 'prompt')"),
        ("", "the prompt is empty (column 'prompt')"),
        ([], "the prompt is empty (column 'prompt')"),
        (3.5, "the prompt (column 'prompt') is float"),
        ([1, "a"], "the prompt (column 'prompt') is list"),
        ([{"content": "a"}], "the prompt (column 'prompt') is list"),
        ({"other": 3}, "there is no 'prompt' in the row"),
    ],
    ids=str,
)
def test_what_is_no_prompt_fails_its_row(value: Any, error: str) -> None:
    rows = [value if isinstance(value, dict) else {"prompt": value}, {"prompt": [4]}]
    bad, good = PromptMaker(Tokenizer(), "prompt", {})(RowBlock(0, rows), [0, 1])
    assert bad.error is not None and bad.error.startswith(error)
    assert good == PreparedRow(1, [4])


def test_a_function_of_the_row() -> None:
    assert make([{"prompt": 0, "a": [4, 5]}], prompt=lambda row: row["a"])[0].prompt == [4, 5]
    (row,) = make([{"prompt": 0}], prompt=lambda row: None)
    assert row.error == "the prompt is None (`prompt` function)"
    assert make(["a"], prompt=lambda row: 1 // 0)[0].error == "integer division or modulo by zero"

    class Silent(Exception):
        pass

    def fails(row: Any) -> Any:
        raise Silent

    assert make(["a"], prompt=fails)[0].error == "Silent"


def test_chats(calls: list[Any]) -> None:
    system = {"role": "system", "content": "be kind"}
    begun = {"role": "assistant", "content": "well"}
    given = {"add_generation_prompt": True, "continue_final_message": False}
    goes_on = {"add_generation_prompt": False, "continue_final_message": True}
    made = make([[{**HELLO, "name": None}], [HELLO, begun], {"role": ["user"], "content": ["hello"]}])
    assert [row.prompt for row in made] == [[1], [2], [1]]
    assert calls == [([HELLO], given), ([HELLO, begun], goes_on), ([HELLO], given)]
    calls.clear()
    make(["hello"], chat=True)
    make(["hello", [system, HELLO], [HELLO]], system_prompt="be kind", chat_template_arguments={"thinks": False})
    assert calls == [([HELLO], given), *[([system, HELLO], {**given, "thinks": False})] * 3]


@pytest.mark.parametrize(
    "tools",
    [
        [{"name": "a", "more": None}, {"name": "b", "more": {"x": 1, "y": None, "z": [{"u": None}]}}],
        json.dumps([{"name": "a"}, {"name": "b", "more": {"x": 1, "z": [{}]}}]),
        {"name": ["a", "b"], "more": [None, {"x": 1, "z": [{}]}]},
        np.array([{"name": "a"}, {"name": "b", "more": {"x": 1, "z": [{}]}}]),
    ],
    ids=["list", "text", "structure", "array"],
)
def test_tools(calls: list[Any], tools: Any) -> None:
    make([{"prompt": "hello", "tools": tools}], tools="tools")
    ((messages, arguments),) = calls
    assert messages == [HELLO]
    assert arguments["tools"] == [{"name": "a"}, {"name": "b", "more": {"x": 1, "z": [{}]}}]


@pytest.mark.parametrize("none", [None, [], "", " ", "[]"])
def test_a_row_without_tools(calls: list[Any], none: Any) -> None:
    make([{"prompt": "hello", "tools": none}], tools="tools")
    ((_, arguments),) = calls
    assert "tools" not in arguments


def test_tools_that_are_no_list_fail_their_row() -> None:
    (row,) = make([{"prompt": "hello", "tools": '{"name": "a"}'}], tools="tools")
    assert row.error == "the tools are dict; they must be a list of JSON schemas, or its JSON text"


def test_parameters_of_rows() -> None:
    columns = {"seed": "s", "temperature": "t", "stop_strings": "x"}
    row, plain = make(
        [{"prompt": [1], "s": 7.0, "t": 0.5, "x": np.array(["a"])}, {"prompt": [1], "s": None, "t": None, "x": None}],
        parameters=columns,
    )
    assert (row.seed, row.parameters) == (7, {"temperature": 0.5, "stop_strings": ["a"]})
    assert type(row.seed) is int
    assert (plain.seed, plain.parameters, plain.error) == (None, {}, None)


def test_a_text_without_a_tokenizer() -> None:
    (row,) = PromptMaker(None, "prompt", {})(RowBlock(0, [{"prompt": "a"}]), [0])
    assert row.error is not None and row.error.startswith("`tokenizer` is None")


def test_each_thread_has_one_copy_of_the_tokenizer() -> None:
    tokenizer = Tokenizer()
    prompts = PromptMaker(tokenizer, "prompt", {})
    own = prompts._own_tokenizer()
    assert own is not tokenizer and prompts._own_tokenizer() is own


def test_a_tokenizer_that_loses_a_text_is_not_believed() -> None:
    class Loses(Tokenizer):
        def __call__(self, texts: list[str], **given: Any) -> dict[str, Any]:
            return {"input_ids": [[5]] * (len(texts) - 1)}

    with pytest.raises(ValueError, match="shorter"):
        make(["a", "b"], tokenizer=Loses())


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_is_no_error_of_a_row(kind: Any) -> None:
    def ends(row: Any) -> Any:
        raise kind

    with pytest.raises(kind):
        make(["a"], prompt=ends)
