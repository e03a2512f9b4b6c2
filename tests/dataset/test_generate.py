"""`generate_dataset` without a folder: every kind of dataset, every kind of prompt, against plain `generate`."""

from __future__ import annotations

import copy
import inspect
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List, Value
from support.tiny_models import EOS, greedy_alone
from transformers import GenerationConfig

from hf_async_batching import DatasetRowError, UnsupportedArgumentError, generate, generate_dataset
from hf_async_batching.dataset.generate import _followed
from hf_async_batching.inputs.request_builder import seeds_of_rows

TEXTS = [f"{'abc' * (i % 7)}ROW{chr(40 + 2 * i)}" for i in range(30)]
ENDS = [EOS, 17]
NEW = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": ENDS}
ADDED = ["completion", "completion_ids", "finish_reason", "prompt_tokens", "completion_tokens"]


def greedy(model: Any, ids: list[int]) -> list[int]:
    return greedy_alone(model, ids, 9, eos_token_id=ENDS)


@pytest.fixture(scope="module")
def rows(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """What a plain loop gives."""
    rows = []
    for i, text in enumerate(TEXTS):
        ids = tokenizer(text).input_ids
        new = greedy(model, ids)
        rows.append(
            {
                "prompt": text,
                "n": i,
                "completion": tokenizer.decode(new, skip_special_tokens=True),
                "completion_ids": new,
                "finish_reason": "eos" if new[-1] in ENDS else "length",
                "prompt_tokens": len(ids),
                "completion_tokens": len(new),
            }
        )
    return rows


@pytest.fixture
def dataset() -> Dataset:
    return Dataset.from_dict({"prompt": TEXTS, "n": range(len(TEXTS))})


def test_the_rows_differ(rows: list[dict[str, Any]]) -> None:
    assert len({row["completion"] for row in rows}) > 10
    assert {row["finish_reason"] for row in rows} == {"eos", "length"}


def test_dataset(manager: Any, tokenizer: Any, dataset: Dataset, rows: list[dict[str, Any]]) -> None:
    done = generate_dataset(manager, dataset, tokenizer, **NEW)
    assert isinstance(done, Dataset)
    assert done.to_list() == rows
    assert done.features == Features(
        {
            "prompt": Value("string"),
            "n": Value("int64"),
            "completion": Value("string"),
            "completion_ids": List(Value("int32")),
            "finish_reason": Value("string"),
            "prompt_tokens": Value("int32"),
            "completion_tokens": Value("int32"),
        }
    )


def test_through_the_models_shared_manager(
    model: Any, tokenizer: Any, dataset: Dataset, rows: list[dict[str, Any]]
) -> None:
    import hf_async_batching

    done = generate_dataset(model, dataset.select(range(4)), tokenizer, **NEW)
    hf_async_batching.get_manager(model).close()
    assert done.to_list() == rows[:4]


def test_selected_and_formatted(manager: Any, tokenizer: Any, dataset: Dataset, rows: list[dict[str, Any]]) -> None:
    chosen = dataset.select([5, 3, 28]).with_format("numpy", columns=["n"])
    done = generate_dataset(manager, chosen, tokenizer, **NEW).with_format(None)
    assert done.to_list() == [rows[5], rows[3], rows[28]]


@pytest.mark.parametrize("window", [1, 5, 64, 8192])
def test_window(manager: Any, tokenizer: Any, dataset: Dataset, rows: list[dict[str, Any]], window: int) -> None:
    assert generate_dataset(manager, dataset, tokenizer, window=window, **NEW).to_list() == rows


def test_stream(manager: Any, tokenizer: Any, dataset: Dataset, rows: list[dict[str, Any]]) -> None:
    done = generate_dataset(manager, dataset.to_iterable_dataset(), tokenizer, **NEW)
    assert isinstance(done, IterableDataset)
    assert list(done) == rows
    assert list(done.features) == ["prompt", "n", *ADDED]
    assert list(done.take(3)) == rows[:3]  # read again, and left early


def test_stream_without_features(manager: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    def read() -> Any:
        for i, text in enumerate(TEXTS):
            yield {"prompt": text, "late": None if i < 20 else i}

    stream = IterableDataset.from_generator(read)
    assert stream.features is None
    done = list(generate_dataset(manager, stream, tokenizer, **NEW))
    assert [row["completion"] for row in done] == [row["completion"] for row in rows]
    assert [row["late"] for row in done] == [None] * 20 + list(range(20, 30))


def test_stream_whose_later_rows_have_other_columns(manager: Any, tokenizer: Any) -> None:
    stream = IterableDataset.from_generator(lambda: ({"prompt": "a", "x" if i < 64 else "y": 1} for i in range(70)))
    with pytest.raises(ValueError, match=r"rows from 64 on do not fit .*\['y'\].*Features"):
        list(generate_dataset(manager, stream, tokenizer, **NEW))


def test_dictionaries_of_splits(manager: Any, tokenizer: Any, dataset: Dataset, rows: list[dict[str, Any]]) -> None:
    splits = {"train": dataset.select(range(10)), "test": dataset.select(range(10, 14))}
    done = generate_dataset(manager, DatasetDict(splits), tokenizer, **NEW)
    assert isinstance(done, DatasetDict)
    assert list(done) == ["train", "test"]
    assert done["train"].to_list() == rows[:10]
    assert done["test"].to_list() == rows[10:14]
    streams = IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
    streamed = generate_dataset(manager, streams, tokenizer, **NEW)
    assert isinstance(streamed, IterableDatasetDict)
    assert list(streamed["test"]) == rows[10:14]


def test_plain_rows(manager: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    plain = [{"prompt": text, "n": i} for i, text in enumerate(TEXTS)]
    assert generate_dataset(manager, plain, tokenizer, **NEW) == rows
    lazy = generate_dataset(manager, iter(plain), tokenizer, **NEW)
    assert [next(lazy) for _ in range(3)] == rows[:3]
    lazy.close()
    assert generate_dataset(manager, [], tokenizer, **NEW) == []


def test_texts_frames_and_generators(manager: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    pandas = pytest.importorskip("pandas")
    new = [{name: row[name] for name in ("prompt", *ADDED)} for row in rows]
    assert generate_dataset(manager, list(TEXTS), tokenizer, **NEW) == new
    assert list(generate_dataset(manager, (text for text in TEXTS), tokenizer, **NEW)) == new
    frame = pandas.DataFrame({"prompt": TEXTS, "n": range(len(TEXTS))}, index=range(100, 100 + len(TEXTS)))
    done = generate_dataset(manager, frame, tokenizer, **NEW)
    assert list(done.index) == list(frame.index)
    assert done.to_dict("records") == rows
    assert list(frame.columns) == ["prompt", "n"], "the frame that was given stays as it is"


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"a": {"type": "string"}}}}]


def test_tools_of_a_row_reach_the_chat_template(model: Any, manager: Any, tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% if tools %}{{ tools | tojson | length }}{{ tools[0].function.name }}{% endif %}" + str(
        tokenizer.chat_template
    )
    user = [{"role": "user", "content": "Hi"}]
    other = [{"type": "function", "function": {"name": "go", "parameters": {"b": {"type": "number"}}}}]
    expected = [
        greedy(model, own.apply_chat_template(user, tools=tools, add_generation_prompt=True)["input_ids"])
        for tools in (TOOLS, other, None)
    ]
    assert expected[0] != expected[2]
    columns = {"prompt": ["Hi"] * 3}
    for given in ([TOOLS, other, None], [json.dumps(TOOLS), json.dumps(other), ""]):
        for rows in (
            Dataset.from_dict({**columns, "t": given}),
            [{"prompt": "Hi", "t": tools} for tools in given],
        ):
            done = generate_dataset(manager, rows, own, tools="t", **NEW)
            assert [row["completion_ids"] for row in done] == expected
    with pytest.raises(ValueError, match="`tools`: the dataset has no column 'u'"):
        generate_dataset(manager, Dataset.from_dict(columns), own, tools="u", **NEW)
    with pytest.raises(DatasetRowError, match="list of JSON schemas"):
        generate_dataset(manager, [{"prompt": "Hi", "t": '{"type": "function"}'}], own, tools="t", **NEW)


def test_empty_dataset(manager: Any, tokenizer: Any, dataset: Dataset) -> None:
    done = generate_dataset(manager, dataset.select([]), tokenizer, **NEW)
    assert len(done) == 0
    assert done.column_names == ["prompt", "n", *ADDED]


def test_prompts_of_every_kind(model: Any, manager: Any, tokenizer: Any) -> None:
    user = [{"role": "user", "content": "Hi"}]
    begun = [*user, {"role": "assistant", "content": "Yo"}]
    told = [{"role": "system", "content": "Be-brief"}, *user]
    chat = tokenizer.apply_chat_template
    ids = {
        "text": tokenizer("Hi").input_ids,
        "user": chat(user, add_generation_prompt=True)["input_ids"],
        "begun": chat(begun, continue_final_message=True)["input_ids"],
        "told": chat(told, add_generation_prompt=True)["input_ids"],
        "tokens": [5, 6, 7],
    }
    expected = {name: greedy(model, tokens) for name, tokens in ids.items()}

    def run(column: Any, **arguments: Any) -> list[list[int]]:
        dataset = column if isinstance(column, Dataset) else Dataset.from_dict({"p": column})
        return generate_dataset(manager, dataset, tokenizer, **{"prompt": "p", **NEW, **arguments})["completion_ids"][
            :
        ]

    assert run(["Hi"]) == [expected["text"]]
    assert run([user, begun, told]) == [expected["user"], expected["begun"], expected["told"]]
    assert run([[5, 6, 7]]) == [expected["tokens"]]
    assert run(["Hi"], chat=True) == [expected["user"]]
    assert run(["Hi"], system_prompt="Be-brief") == [expected["told"]]
    assert run([user, told], system_prompt="Be-brief") == [expected["told"], expected["told"]]
    mixed = {"t": "Hi", "m": user, "i": torch.tensor([5, 6, 7])}
    assert run(["t", "m", "i"], prompt=lambda row: mixed[row["p"]]) == [
        expected["text"],
        expected["user"],
        expected["tokens"],
    ]
    # A message's fields that only others have, and the older layout, a structure of lists.
    named = [[{**user[0], "name": None}], [{**user[0], "name": "Bo"}]]
    assert run(named) == [expected["user"]] * 2
    lists = Dataset.from_list([{"p": {"role": ["user"], "content": ["Hi"]}}])
    assert run(lists) == [expected["user"]]


def test_without_a_tokenizer(model: Any, manager: Any) -> None:
    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]]})
    done = generate_dataset(manager, dataset, prompt="input_ids", **NEW)
    assert "completion" not in done.column_names
    assert done["completion_ids"][:] == [greedy(model, [5, 6, 7]), greedy(model, [8, 9])]


def test_several_completions_and_logprobs(model: Any, manager: Any, tokenizer: Any, dataset: Dataset) -> None:
    sampled = {"max_new_tokens": 6, "do_sample": True, "temperature": 1.3, "eos_token_id": None}
    once = generate_dataset(manager, dataset, tokenizer, num_return_sequences=3, logprobs=True, seed=7, **sampled)
    again = generate_dataset(manager, dataset, tokenizer, num_return_sequences=3, logprobs=True, seed=7, **sampled)
    other = generate_dataset(manager, dataset, tokenizer, num_return_sequences=3, logprobs=True, seed=8, **sampled)
    assert once.to_list() == again.to_list()
    assert once["completion_ids"][:] != other["completion_ids"][:]
    assert once.features["completion_logprobs"] == List(List(Value("float32")))
    for row in once:
        assert len({tuple(ids) for ids in row["completion_ids"]}) == 3
        assert row["completion"] == tokenizer.batch_decode(row["completion_ids"], skip_special_tokens=True)
        assert row["completion_tokens"] == [6, 6, 6]
        for ids, logprobs in zip(row["completion_ids"], row["completion_logprobs"], strict=True):
            prompt = tokenizer(row["prompt"]).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(logprobs), expected, atol=1e-4)


def test_a_row_depends_on_its_index_alone(manager: Any, tokenizer: Any, dataset: Dataset) -> None:
    sampled = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2}
    whole = generate_dataset(manager, dataset, tokenizer, **sampled)
    part = generate_dataset(manager, dataset.select(range(4)), tokenizer, window=1, **sampled)
    assert part.to_list() == whole.to_list()[:4]


def test_parameters_of_rows(model: Any, manager: Any, tokenizer: Any) -> None:
    dataset = Dataset.from_dict(
        {
            "prompt": ["abc", "abc", "abc", "abc"],
            "budget": [3, 7, None, 5],
            "temperature": [None, None, 0.5, 2.0],
            "do_sample": [None, False, True, True],
            "seed": [1, 2, 3, None],
        }
    )
    parameters = {"max_new_tokens": "budget", "temperature": "temperature", "do_sample": "do_sample", "seed": "seed"}
    common = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None)
    done = generate_dataset(manager, dataset, tokenizer, generation_config=common, row_parameters=parameters)
    assert done["completion_tokens"][:] == [3, 7, 4, 5]
    ids = torch.tensor([tokenizer("abc").input_ids])
    assert done["completion_ids"][1] == greedy_alone(model, ids[0].tolist(), 7, eos_token_id=None)
    sampled = generate(model, ids, generation_config=common, do_sample=True, temperature=0.5, seed=3, manager=manager)
    assert done["completion_ids"][2] == sampled[0, ids.shape[1] :].tolist()
    named = generate_dataset(
        manager, dataset.rename_column("budget", "max_new_tokens"), tokenizer,
        generation_config=common, row_parameters=["max_new_tokens", "temperature", "do_sample", "seed"],
    )  # fmt: skip
    assert named["completion_ids"][:] == done["completion_ids"][:]


def test_the_completions_of_a_row_with_a_seed(manager: Any, model: Any, tokenizer: Any) -> None:
    dataset = Dataset.from_dict({"prompt": ["abc"], "seed": [11]})
    sampled = {"max_new_tokens": 6, "do_sample": True, "eos_token_id": None}
    done = generate_dataset(manager, dataset, tokenizer, row_parameters=["seed"], num_return_sequences=3, **sampled)
    ids = torch.tensor([tokenizer("abc").input_ids])
    for tokens, seed in zip(done["completion_ids"][0], seeds_of_rows(11, 3), strict=True):
        out = generate(model, ids, seed=seed, manager=manager, **sampled)
        assert tokens == out[0, ids.shape[1] :].tolist()


def test_stop_strings(model: Any, manager: Any, tokenizer: Any) -> None:
    texts = [f"text-{chr(40 + i)}" for i in range(8)]
    plain = [greedy_alone(model, tokenizer(text).input_ids, 20, eos_token_id=None) for text in texts]
    stops = [tokenizer.decode(tokens[5:7]) for tokens in plain]
    dataset = Dataset.from_dict({"prompt": texts, "stop": [None, *stops[1:]]})
    new = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    done = generate_dataset(manager, dataset, tokenizer, row_parameters=["stop"], **new)
    assert done["completion_ids"][0] == plain[0]
    assert done["finish_reason"][:] == ["length"] + ["stop"] * 7
    for text, stop, row in zip(texts[1:], stops[1:], done.select(range(1, 8)), strict=True):
        ids = tokenizer(text).input_ids
        assert row["completion_ids"] == greedy_alone(
            model, ids, 20, eos_token_id=None, stop_strings=stop, tokenizer=tokenizer
        )
    common = generate_dataset(manager, dataset, tokenizer, stop_strings=stops[3], **new)
    assert common["completion_ids"][3] == done["completion_ids"][3]
    with pytest.raises(ValueError, match="`stop_strings` need a `tokenizer`"):
        generate_dataset(manager, dataset, stop_strings="x", **new)


@pytest.mark.parametrize(
    "field", [{"repetition_penalty": 1.7}, {"encoder_repetition_penalty": 1.7}, {"min_length": 10}]
)
def test_fields_that_look_at_the_prompt(model: Any, manager: Any, tokenizer: Any, field: Any) -> None:
    texts = [f"{'text' * (i % 3)}{chr(40 + i)}" for i in range(8)]
    new = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": ENDS, **field}
    done = generate_dataset(manager, Dataset.from_dict({"prompt": texts}), tokenizer, **new)
    del new["max_new_tokens"], new["do_sample"]
    assert done["completion_ids"][:] == [greedy_alone(model, tokenizer(t).input_ids, 12, **new) for t in texts]


BAD = ["fine", None, "", "x" * 600, "fine"]


def test_errors_are_recorded(manager: Any, tokenizer: Any, model: Any) -> None:
    done = generate_dataset(manager, Dataset.from_dict({"prompt": BAD}), tokenizer, on_error="record", **NEW)
    expected = greedy(model, tokenizer("fine").input_ids)
    assert done["completion_ids"][:] == [expected, None, None, None, expected]
    assert done["finish_reason"][1:4] == [None] * 3
    errors = done["error"]
    assert errors[0] is None
    assert errors[4] is None
    assert "prompt is None (column 'prompt')" in errors[1]
    assert "prompt is empty" in errors[2]
    assert "600 tokens" in errors[3]
    assert "max_sequence_length" in errors[3]
    assert done["prompt_tokens"][:] == [4, None, None, 600, 4]


@pytest.mark.parametrize(("bad", "message"), [(1, "row 1: the prompt is None"), (3, "row 1: .*600 tokens.*record")])
def test_errors_are_raised(manager: Any, tokenizer: Any, bad: int, message: str) -> None:
    with pytest.raises(DatasetRowError, match=message) as raised:
        generate_dataset(manager, Dataset.from_dict({"prompt": ["fine", BAD[bad]]}), tokenizer, **NEW)
    assert raised.value.index == 1
    assert manager.submit([5, 6], max_new_tokens=2).result().token_ids  # no other request noticed


class Panic(BaseException):
    """As errors of native tokenizers are that come through pyo3."""


def test_what_is_no_exception_is_an_error_of_its_row(manager: Any, tokenizer: Any) -> None:
    def prompt(row: dict[str, Any]) -> str:
        if row["n"] == 1:
            raise Panic("in a prompt")
        return "fine"

    def panics(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 8:
            raise Panic("in a processor")
        return scores

    rows = Dataset.from_dict({"n": range(3)})
    done = generate_dataset(manager, rows, tokenizer, prompt=prompt, on_error="record", **NEW)
    assert done["error"][:] == [None, "in a prompt", None]
    rows = Dataset.from_dict({"prompt": ["fine", "ine"]})
    done = generate_dataset(
        manager, rows, tokenizer, logits_processor=[panics], on_error="record", max_new_tokens=5, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    assert done["error"][:] == ["in a processor", None]


def test_errors_of_functions_tokens_and_parameters(manager: Any, tokenizer: Any) -> None:
    def prompt(row: dict[str, Any]) -> Any:
        return {0: "fine", 1: [5, 1000], 2: 3.5, 3: [[1]], 4: row["n"] // 0 if row["n"] == 4 else "fine"}.get(
            row["n"], "fine"
        )

    dataset = Dataset.from_dict({"n": range(7), "temperature": [1.0] * 5 + [-1.0, 1.0]})
    done = generate_dataset(
        manager, dataset, tokenizer, prompt=prompt, row_parameters=["temperature"], on_error="record",
        max_new_tokens=3, do_sample=True,
    )  # fmt: skip
    errors = done["error"][:]
    assert [error is None for error in errors] == [True, False, False, False, False, False, True]
    assert "token id 1000" in errors[1]
    assert "`prompt` function) is float" in errors[2]
    assert "list of token ids" in errors[3]
    assert "zero" in errors[4]
    assert "temperature" in errors[5]


def test_a_completion_that_fails_fails_its_row(manager: Any, tokenizer: Any) -> None:
    dataset = Dataset.from_dict({"prompt": ["ab", "x" * 600, "cd"]})
    done = generate_dataset(
        manager, dataset, tokenizer, on_error="record", num_return_sequences=4, max_new_tokens=3, do_sample=True
    )
    assert [len(ids) if ids else None for ids in done["completion_ids"]] == [4, None, 4]


def test_output_columns(manager: Any, tokenizer: Any, dataset: Dataset, rows: list[dict[str, Any]]) -> None:
    names = {"text": "answer", "token_ids": None, "finish_reason": None, "prompt_tokens": None}
    done = generate_dataset(manager, dataset, tokenizer, output_columns=names, **NEW)
    assert done.column_names == ["prompt", "n", "answer", "completion_tokens"]
    assert done["answer"][:] == [row["completion"] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "question"}, "`prompt`: the dataset has no column 'question'; it has 'prompt', 'n'"),
        ({"row_parameters": ["temperature"]}, r"`row_parameters\['temperature'\]`: the dataset has no column"),
        ({"row_parameters": {"heat": "n"}}, "GenerationConfig has no 'heat'"),
        ({"row_parameters": {"num_return_sequences": "n"}}, "the same for all rows"),
        ({"output_columns": {"text": "n"}}, "column 'n' already"),
        ({"output_columns": {"words": "w"}}, "its keys are text, "),
        ({"output_columns": {"text": "x", "error": "x"}}, "one column twice"),
        ({"on_error": "ignore"}, "`on_error`"),
        ({"seed": -1}, "`seed`"),
        ({"window": 0}, "`window`"),
        ({"num_return_sequences": 2}, "do_sample=True"),
        ({"num_return_sequences": 0}, "`num_return_sequences`"),
        ({"rank": 1}, "`world_size`"),
        ({"rank": 2, "world_size": 2}, "`rank`"),
        ({"rank": 0, "world_size": 2}, "resume_dir"),
        ({"temperature": -1.0, "do_sample": True}, "temperature"),
    ],
)
def test_bad_arguments(manager: Any, tokenizer: Any, dataset: Dataset, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_dataset(manager, dataset, tokenizer, **{**NEW, **arguments})


def test_defaults() -> None:
    parameters = inspect.signature(generate_dataset).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default not in (None, one.empty)}
    assert defaults == {
        "prompt": "prompt",
        "seed": 0,
        "on_error": "raise",
        "logprobs": False,
        "chat": False,
        "skip_special_tokens": True,
        "window": 8192,
    }


def test_other_bad_arguments(manager: Any, tokenizer: Any, dataset: Dataset) -> None:
    from hf_async_batching import BatchingConfig

    with pytest.raises(TypeError, match="wished"):
        generate_dataset(manager, dataset, tokenizer, wished=1)
    for wrong, meant in (("max_new_token", "max_new_tokens"), ("resume_dirs", "resume_dir")):
        with pytest.raises(TypeError, match=rf"\['{wrong}'\]; did you mean `{meant}`\?"):
            generate_dataset(manager, dataset, tokenizer, **{wrong: 1})
    with pytest.raises(UnsupportedArgumentError, match="callback"):
        generate_dataset(manager, dataset, tokenizer, streamer=print)
    with pytest.raises(UnsupportedArgumentError, match="num_beams"):
        generate_dataset(manager, dataset, tokenizer, num_beams=2)
    with pytest.raises(UnsupportedArgumentError, match="batching_config"):
        generate_dataset(manager, dataset, tokenizer, batching_config=BatchingConfig(max_rows=3))
    with pytest.raises(ValueError, match="`dataset` must be"):
        generate_dataset(manager, "rows.csv", tokenizer)
    with pytest.raises(ValueError, match=r"Dataset\.from_list"):
        generate_dataset(manager, [{"prompt": "a"}], tokenizer, resume_dir="somewhere")
    with pytest.raises(ValueError, match="need a `tokenizer`"):
        generate_dataset(manager, dataset, chat=True)


def test_progress(
    manager: Any, tokenizer: Any, dataset: Dataset, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    generate_dataset(manager, dataset, tokenizer, callback=seen.append, **NEW)
    assert capsys.readouterr().err == ""  # not a terminal
    last = seen[-1]
    assert (last.rows, last.total, last.failed, last.resumed) == (30, 30, 0, 0)
    assert last.remaining_seconds == 0
    assert last.tokens == sum(
        len(greedy) for greedy in generate_dataset(manager, dataset, tokenizer, **NEW)["completion_ids"]
    )
    generate_dataset(manager, dataset, tokenizer, progress=True, **NEW)
    err = capsys.readouterr().err
    assert "30/30" in err
    assert "tok/s" in err


def test_a_callback_that_raises_ends_the_run(manager: Any, tokenizer: Any, dataset: Dataset) -> None:
    def callback(progress: Any) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        generate_dataset(manager, dataset, tokenizer, callback=callback, **NEW)
    assert manager.submit([5, 6], max_new_tokens=2).result().token_ids


def test_a_rank_that_follows_loads_nothing_where_nothing_is_kept() -> None:
    rows = [{"prompt": "Hello"}]
    for dataset, folder in ((Dataset.from_list(rows), None), (rows, "a folder")):
        settings: Any = SimpleNamespace(resume_dir=folder, features=None)
        assert _followed(settings, dataset, "") is None
