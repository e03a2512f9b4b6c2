"""What is served are the rows as `dataset[i]` shows them: decoded, transformed, in every way in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from support.character_tokenizer import character_tokenizer

from hf_async_batching import ResumeMismatchError, generate_dataset
from hf_async_batching.dataset.rows.formats import WithColumns

NEW: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}

# Shows each field of a message, also those that are None deep inside.
TEMPLATE = (
    "{% for m in messages %}{% for k in m %}{{ k }}{% if m[k] is string %}{{ m[k] }}{% else %}{{ m[k]|tojson }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
USER = {"role": "user", "content": "Hi"}
CHATS: list[Any] = [
    [USER],
    [{**USER, "name": "Bob"}],
    [USER, {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"city": "rome"}}]}, USER],
    [USER, {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"unit": "c", "deep": [None]}}]}, USER],
]


@pytest.fixture
def chat_tokenizer() -> Any:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def jsonl(path: Path, rows: list[Any], **arguments: Any) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent), **arguments)


def loop(tokenizer: Any, rows: Any) -> list[int]:
    """Prompt lengths of a user's own loop."""
    lengths = []
    for row in rows:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            lengths.append(len(tokenizer(prompt).input_ids))
        else:
            lengths.append(len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]))
    return lengths


def lengths(manager: Any, data: Any, tokenizer: Any, **arguments: Any) -> list[int]:
    return [row["prompt_tokens"] for row in generate_dataset(manager, data, tokenizer, **{**NEW, **arguments})]


MIXED = [*CHATS, "Tell-me", [3, 4, 5]]


@pytest.mark.parametrize("way", ["dataset", "function", "stream", "folder", "stream folder", "list", "generator"])
@pytest.mark.parametrize("prompts", [CHATS, ["Tell-me", CHATS[1]]], ids=["chats", "mixed"])
def test_json_features_are_decoded(
    manager: Any, chat_tokenizer: Any, tmp_path: Path, way: str, prompts: list[Any]
) -> None:
    rows = [{"prompt": prompt, "n": i} for i, prompt in enumerate(prompts)]
    arguments: dict[str, Any] = {}
    data = jsonl(tmp_path / "in.jsonl", rows, streaming="stream" in way)
    assert "Json" in repr(data.features)
    if way in ("list", "generator"):
        data = rows if way == "list" else (row for row in rows)
    if way == "function":
        arguments["prompt"] = lambda row: row["prompt"]
    if "folder" in way:
        arguments["resume_dir"] = tmp_path / "run"
    expected = loop(chat_tokenizer, rows if way in ("list", "generator") else data)
    assert expected == loop(chat_tokenizer, rows)
    done = list(generate_dataset(manager, data, chat_tokenizer, **{**NEW, **arguments}))
    assert [row["prompt_tokens"] for row in done] == expected
    assert [row["prompt"] for row in done] == prompts
    if "folder" in way:
        again = generate_dataset(manager, data, chat_tokenizer, **{**NEW, **arguments})
        assert list(again) == done
        assert again.features["prompt"] == data.features["prompt"]
        loaded = load_dataset(
            "parquet", data_dir=str(tmp_path / "run" / "data"), split="train", cache_dir=str(tmp_path)
        )
        assert loaded["prompt"][:] == prompts


def test_parameters_of_json_columns(manager: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "budget": 3}, {"prompt": "a", "budget": None}, {"prompt": "a", "budget": "many"}]
    data = jsonl(tmp_path / "in.jsonl", rows)
    done = generate_dataset(
        manager, data, tokenizer, row_parameters={"max_new_tokens": "budget"}, on_error="record", **NEW
    )
    assert done["completion_tokens"][:] == [3, 2, None]
    assert done["error"][2]


def test_structures_are_those_of_the_loop(manager: Any, chat_tokenizer: Any) -> None:
    """Arrow gives each structure the fields of all others; a list, and a stream of no known type, do not."""
    rows = [{"prompt": chat} for chat in CHATS[2:]]
    unified = Dataset.from_list(rows)
    assert lengths(manager, unified, chat_tokenizer) == loop(chat_tokenizer, unified)
    assert lengths(manager, unified.to_iterable_dataset(), chat_tokenizer) == loop(chat_tokenizer, unified)
    assert lengths(manager, rows, chat_tokenizer) == loop(chat_tokenizer, rows)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert lengths(manager, stream, chat_tokenizer) == loop(chat_tokenizer, rows)
    assert loop(chat_tokenizer, rows) != loop(chat_tokenizer, unified)


def test_a_stream_of_several_types(manager: Any, chat_tokenizer: Any) -> None:
    rows = [{"prompt": "Tell-me"}, {"prompt": CHATS[1]}]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    done = list(generate_dataset(manager, stream, chat_tokenizer, **NEW))
    assert [row["prompt"] for row in done] == [row["prompt"] for row in rows]
    assert [row["prompt_tokens"] for row in done] == loop(chat_tokenizer, rows)


def ask(batch: dict[str, Any]) -> dict[str, Any]:
    return {"question": [f"question-{text}" for text in batch["prompt"]], "n": batch["n"]}


@pytest.mark.parametrize("way", ["column", "function", "folder"])
def test_a_transform_is_served(manager: Any, tokenizer: Any, tmp_path: Path, way: str) -> None:
    data = Dataset.from_dict({"prompt": ["abc", "de"], "n": [1, 2]})
    stored = data.to_list()
    data.set_transform(ask)
    arguments: dict[str, Any] = {"prompt": (lambda row: row["question"]) if way == "function" else "question"}
    if way == "folder":
        arguments["resume_dir"] = tmp_path / "run"
    done = generate_dataset(manager, data, tokenizer, **NEW, **arguments)
    assert done["prompt_tokens"][:] == [len("question-abc"), len("question-de")]
    shown = generate_dataset(manager, [data[0], data[1]], tokenizer, prompt="question", **NEW)
    assert done[:] == {name: [row[name] for row in shown] for name in done[0]}
    assert [{name: row[name] for name in stored[0]} for row in done.with_format(None)] == stored
    with pytest.raises(ValueError, match="no column 'prompt'; it has 'question', 'n'"):
        generate_dataset(manager, data, tokenizer, **NEW)
    if way == "folder":
        assert generate_dataset(manager, data, tokenizer, **NEW, **arguments)[:] == done[:]
        data.set_transform(lambda batch: {"question": batch["prompt"]})
        with pytest.raises(ResumeMismatchError, match=r"transform: .* before"):
            generate_dataset(manager, data, tokenizer, **NEW, **arguments)


def test_a_transform_that_raises(manager: Any, tokenizer: Any, tmp_path: Path, caplog: Any) -> None:
    """The rows before are kept, also those that are read in one piece with it."""

    def bad(batch: dict[str, Any]) -> dict[str, Any]:
        if "bad" in batch["prompt"]:
            raise RuntimeError("a bad row")
        return batch

    data = Dataset.from_dict({"prompt": [*(["abc"] * 70), "bad", "abc"]})
    data.set_transform(bad)
    with pytest.raises(RuntimeError, match="a bad row"):
        generate_dataset(manager, data, tokenizer, resume_dir=tmp_path / "run", **NEW)
    assert "70 of 72 rows are kept" in caplog.text
    data.set_transform(lambda batch: {"prompt": batch["prompt"][:-1]})
    with pytest.raises(ValueError, match="changes the number of rows"):
        generate_dataset(manager, data, tokenizer, **NEW)
    empty = data.select([])
    assert len(generate_dataset(manager, empty, tokenizer, **NEW)) == 0


@pytest.mark.parametrize("way", ["dataset", "folder", "stream", "empty"])
def test_the_format_is_kept(manager: Any, tokenizer: Any, tmp_path: Path, way: str) -> None:
    data: Any = Dataset.from_dict({"prompt": ["abc", "de"], "n": [1, 2], "m": [3, 4]})
    if way == "stream":
        stream = generate_dataset(manager, data.to_iterable_dataset().with_format("torch"), tokenizer, **NEW)
        assert isinstance(next(iter(stream))["completion_ids"], torch.Tensor)
        return
    data = data.with_format("torch", columns=["prompt", "n"], output_all_columns=False)
    data = data.select([]) if way == "empty" else data
    arguments = {"resume_dir": tmp_path / "run"} if way == "folder" else {}
    done = generate_dataset(manager, data, tokenizer, **NEW, **arguments)
    added = ["completion", "completion_ids", "finish_reason", "prompt_tokens", "completion_tokens"]
    assert done.format["type"] == "torch"
    assert sorted(done.format["columns"]) == sorted(["prompt", "n", *added])
    mapped = data.map(lambda row: dict.fromkeys(added, 1)).format
    assert way == "empty" or {**done.format, "columns": set()} == {**mapped, "columns": set()}
    if way != "empty":
        assert isinstance(done[0]["completion_ids"], torch.Tensor)
        plain = generate_dataset(manager, data.with_format(None), tokenizer, **NEW)
        assert plain.format["type"] is None
        assert done.with_format(None)[:] == plain[:]


@pytest.mark.parametrize("form", ["arrow", "pandas"])
def test_functions_get_dictionaries(manager: Any, tokenizer: Any, form: str) -> None:
    data = Dataset.from_dict({"prompt": ["abc", "de"]}).with_format(form)
    done = generate_dataset(manager, data, tokenizer, prompt=lambda row: row["prompt"] + "?", **NEW)
    assert done.with_format(None)["prompt_tokens"][:] == [4, 3]


def test_a_transform_beside_columns_it_does_not_know() -> None:
    keep = WithColumns(lambda batch: {"b": [a + 1 for a in batch["a"]]}, ["new"])
    assert keep({"a": [1], "new": [5]}) == {"b": [2], "new": [5]}
    assert keep({"new": [5]}) == {"new": [5]}


def test_prompts_without_dictionaries(manager: Any, tokenizer: Any) -> None:
    prompts = ["abc", [USER], [5, 6, 7], torch.tensor([5, 6])]
    expected = [3, len(tokenizer.apply_chat_template([USER], add_generation_prompt=True)["input_ids"]), 3, 2]
    done = generate_dataset(manager, prompts, tokenizer, **NEW)
    assert [row["prompt_tokens"] for row in done] == expected
    assert [row["prompt"] for row in done[:3]] == prompts[:3]
    assert lengths(manager, iter(prompts), tokenizer, prompt="q") == expected
    assert lengths(manager, prompts[:1], tokenizer, prompt=lambda row: row["prompt"] * 2) == [6]


def test_a_data_frame(manager: Any, tokenizer: Any) -> None:
    frame = pd.DataFrame({"prompt": ["abc", "de", None], "budget": ["x", "y", None]}, index=[7, 3, 5])
    done = generate_dataset(manager, frame, tokenizer, on_error="record", **NEW)
    assert isinstance(done, pd.DataFrame)
    assert list(done.index) == [7, 3, 5]
    assert list(done.columns[:3]) == ["prompt", "budget", "completion"]
    assert [None if pd.isna(n) else n for n in done["prompt_tokens"]] == [3, 2, None]
    assert "prompt is None" in done["error"][5]
    assert list(frame.columns) == ["prompt", "budget"]
    assert "error" not in generate_dataset(manager, frame.iloc[:2], tokenizer, **NEW)
    with pytest.raises(ValueError, match="no column 'q'; it has 'prompt', 'budget'"):
        generate_dataset(manager, frame, tokenizer, prompt="q", **NEW)
    with pytest.raises(ValueError, match="from_pandas"):
        generate_dataset(manager, frame, tokenizer, resume_dir="run", **NEW)
    with pytest.raises(ValueError, match="two columns of the DataFrame have the same name"):
        generate_dataset(manager, pd.concat([frame, frame], axis=1), tokenizer, **NEW)
    assert lengths(manager, frame["prompt"][:2], tokenizer) == [3, 2]


def test_what_is_no_row(manager: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="row 0 is of type int; a row is a dictionary, or a prompt"):
        generate_dataset(manager, [1, 2], tokenizer, **NEW)
    with pytest.raises(ValueError, match=r"pyarrow Table; pass datasets.Dataset\(table\)"):
        generate_dataset(manager, Dataset.from_dict({"prompt": ["a"]}).data.table, tokenizer, **NEW)
    rows = generate_dataset(manager, iter(["abc", None]), tokenizer, **NEW)
    assert next(rows)["prompt_tokens"] == 3
    with pytest.raises(ValueError, match="row 1 is of type NoneType"):
        next(rows)
    done = generate_dataset(manager, [{"prompt": USER}], tokenizer, on_error="record", **NEW)
    assert "must be a text, a list of messages" in done[0]["error"]


class Broken(Exception):
    pass


def rows_until(end: int) -> Iterator[dict[str, str]]:
    for i in range(end):
        yield {"prompt": f"text-{i}"}
    raise Broken("the network is gone")


@pytest.mark.parametrize("way", ["plain", "stream", "typed", "folder"])
def test_rows_before_an_error_are_handed_out(
    manager: Any, tokenizer: Any, tmp_path: Path, way: str, caplog: Any
) -> None:
    features = Features({"prompt": Value("string")}) if way == "typed" else None
    data: Any = rows_until(70)
    if way != "plain":
        data = IterableDataset.from_generator(lambda: rows_until(70), features=features)
    arguments = {"resume_dir": tmp_path / "run", "shard_rows": 50} if way == "folder" else {}
    taken: list[Any] = []
    with pytest.raises(Broken, match="network"):
        taken.extend(generate_dataset(manager, data, tokenizer, **NEW, **arguments))
    # `datasets` gives the rows of a stream with features in pieces of 64.
    kept = 64 if way == "typed" else 70
    assert [row["prompt"] for row in taken] == ([] if way == "folder" else [f"text-{i}" for i in range(kept)])
    if way == "folder":
        assert "70 rows are kept" in caplog.text
