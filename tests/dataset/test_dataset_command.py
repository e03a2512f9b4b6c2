"""The command line `dataset`, on files and a tiny model that are made here."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from support.tiny_models import greedy_alone
from transformers import PreTrainedTokenizerFast

from hf_async_batching.cli.main import main
from hf_async_batching.dataset.text_files import write_text

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"text-{chr(40 + 3 * i)}", "n": i, "max_new_tokens": 1 + i % 5} for i in range(12)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def expected(model: Any, tokenizer: Any) -> list[list[int]]:
    return [greedy_alone(model, tokenizer(row["prompt"]).input_ids, 5) for row in ROWS]


def command(model_dir: Path, *arguments: Any) -> int:
    given = ["dataset", "--model", model_dir, "--device", "cpu", *arguments, "--max-rows", "4", "--no-do-sample"]
    return main([str(argument) for argument in given])


def written(kind: str, path: Path) -> Path:
    dataset = Dataset.from_list(ROWS)
    if kind in ("tsv", "jsonl.gz", "txt"):
        file = path.with_suffix(f".{kind}")
        if kind == "txt":
            file.write_text("".join(f"{row['prompt']}\n" for row in ROWS))
        else:
            write_text(dataset, file, ".tsv" if kind == "tsv" else ".jsonl", compressed=kind == "jsonl.gz")
        return file
    if kind == "folder":
        dataset.save_to_disk(path)
        return path
    file = path.with_suffix(f".{kind}")
    {"csv": dataset.to_csv, "jsonl": dataset.to_json, "parquet": dataset.to_parquet}[kind](str(file))
    return file


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("csv", "parquet"),
        ("jsonl", "jsonl"),
        ("parquet", "csv"),
        ("folder", ""),
        ("tsv", "jsonl.gz"),
        ("jsonl.gz", "tsv"),
        ("txt", "parquet"),
    ],
)
def test_files_of_every_kind(
    model_dir: Path, tmp_path: Path, expected: Any, source: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / (f"out.{target}" if target else "out-0.5")
    assert command(model_dir, written(source, tmp_path / "in"), "--output", output, "--max-new-tokens", 5) == 0
    assert f"wrote 12 rows to {output}" in capsys.readouterr().out
    if target:
        builder = {"jsonl": "json", "jsonl.gz": "json", "tsv": "csv"}.get(target, target)
        arguments = {"sep": "\t"} if target == "tsv" else {}
        done = load_dataset(builder, data_files=str(output), split="train", **arguments)
    else:
        done = load_dataset(str(output), split="train")
    ids = [json.loads(row) if isinstance(row, str) else row for row in done["completion_ids"]]
    assert ids == expected
    assert source == "txt" or done["n"][:] == list(range(12))
    assert "error" not in done.column_names
    assert not (tmp_path / f"{output.name}.unfinished").exists()


def test_streaming_limit_and_several_files(model_dir: Path, tmp_path: Path, expected: Any) -> None:
    for part in range(3):
        Dataset.from_list(ROWS[4 * part : 4 * part + 4]).to_json(str(tmp_path / f"part-{part}.jsonl"))
    output = tmp_path / "out.jsonl"
    assert command(model_dir, tmp_path / "part-*.jsonl", "--streaming", "--limit", 7, "--output", output,
                   "--max-new-tokens", 5, "--window", 2) == 0  # fmt: skip
    done = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["completion_ids"] for row in done] == expected[:7]


def test_columns_and_parameters(model_dir: Path, tmp_path: Path, expected: Any) -> None:
    source, output = written("jsonl", tmp_path / "in"), tmp_path / "out.jsonl"
    assert command(model_dir, source, "--row-parameters", "max_new_tokens", "--logprobs", "--completion-column",
                   "answer", "--on-error", "record", "--output", output) == 0  # fmt: skip
    done = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["completion_ids"] for row in done] == [
        ids[: row["max_new_tokens"]] for ids, row in zip(expected, ROWS, strict=True)
    ]
    assert {"answer", "completion_logprobs", "error"} <= done[0].keys()


def test_chat_and_messages_are_the_same(model_dir: Path, tmp_path: Path) -> None:
    rows = [{"q": "Hi", "messages": [{"role": "user", "content": "Hi"}]}]
    (tmp_path / "in.jsonl").write_text(json.dumps(rows[0]))
    for name, column in (("a", ["--prompt-column", "q", "--chat"]), ("b", ["--messages-column", "messages"])):
        assert command(model_dir, tmp_path / "in.jsonl", *column, "--output", tmp_path / f"{name}.jsonl",
                       "--max-new-tokens", 4) == 0  # fmt: skip
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


def test_push_to_hub(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Any] = []
    monkeypatch.setattr(Dataset, "push_to_hub", lambda self, *args, **kwargs: pushed.append((len(self), args, kwargs)))
    assert command(model_dir, written("csv", tmp_path / "in"), "--output", tmp_path / "out", "--push-to-hub",
                   "me/rows", "--private", "--max-new-tokens", 2) == 0  # fmt: skip
    assert pushed == [(12, ("me/rows",), {"private": True})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.csv", "--output", "out"], "INPUT nowhere.csv: there is no such file or folder"),
        (
            ["in.jsonl", "--output", "in.jsonl"],
            "choose another name or delete it; --resume continues",
        ),
        (["in.jsonl", "--output", "out", "--split", "test"], "no split 'test'; choose one of train"),
        (["in.jsonl", "--output", "out", "--private"], "--push-to-hub"),
        (["in.jsonl", "--output", "out", "--limit", "0"], "at least 1"),
        (["*.*", "--output", "out"], "all be of one kind"),
        (["in.jsonl", "--output", "out.xlsx"], "files are .parquet, .jsonl"),
        (["empty.jsonl", "--output", "out"], "INPUT empty.jsonl: the file is empty"),
        (["bad.jsonl", "--output", "out"], "INPUT bad.jsonl, line 2: Expecting value"),
        (
            ["in.jsonl", "--output", "out", "--prompt-column", "q"],
            "--prompt-column: INPUT has no column 'q'; it has 'p",
        ),
        (["in.jsonl", "--output", "out", "--tools-column", "t"], "--tools-column: INPUT has no column 't'"),
        (["in.jsonl", "--output", "out", "--row-parameters", "k"], "--row-parameters: INPUT has no column 'k'"),
        (["in.jsonl", "--output", "out", "--model", "/no/such"], "--model /no/such: there is no such folder"),
        (["in.jsonl", "--output", "out", "--model", "."], "--model .: "),
        (["in.jsonl", "--output", "out", "--device", "toaster"], "--device toaster: torch has no such device"),
        (["bytes.parquet", "--output", "out.csv"], "column 'picture' has them; write a .parquet file or a folder"),
    ],
)
def test_what_a_person_can_put_right(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    written("jsonl", tmp_path / "in")
    (tmp_path / "notes.md").write_text("?")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": oops}\n')
    Dataset.from_dict({"prompt": ["a"], "picture": [b"\x00"]}).to_parquet("bytes.parquet")
    capsys.readouterr()  # bars of what was written
    with pytest.raises(SystemExit) as ended:
        command(model_dir, *arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 2
    assert "usage:" not in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("content", "message", "streaming"),
    [
        (b'{"prompt": "a"}\n{"prompt": oops}\n', "in.jsonl, line 2: Expecting value", True),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "in.jsonl, line 2: 'utf-8' codec", True),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "in.jsonl, line 2: 'utf-8' codec", False),
    ],
)
def test_an_input_that_turns_out_to_be_broken(
    model_dir: Path, tmp_path: Path, capsys: Any, content: bytes, message: str, streaming: bool
) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    arguments = [tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *(["--streaming"] if streaming else [])]
    assert command(model_dir, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_json_file_of_mixed_messages(model_dir: Path, tmp_path: Path, tokenizer: Any) -> None:
    user = {"role": "user", "content": "Hi"}
    rows: list[Any] = [{"prompt": [user]}, {"prompt": [{**user, "name": "Bo", "tool_calls": [{"a": 1}]}]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command(model_dir, tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--max-new-tokens", 2) == 0
    done = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in done] == [row["prompt"] for row in rows]
    length = len(tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"])
    assert [row["prompt_tokens"] for row in done] == [length] * 2


def test_a_bad_row_and_resume(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ["a", "b", None, "c"]))
    arguments = [tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--max-new-tokens", 3]
    assert command(model_dir, *arguments) == 1
    error = capsys.readouterr().err
    assert "row 2: the prompt is None" in error
    assert "the same command with --resume continues" in error
    with pytest.raises(SystemExit):
        command(model_dir, *arguments)
    assert "out.jsonl.unfinished holds an earlier run: pass --resume to continue it" in capsys.readouterr().err
    with caplog.at_level(logging.WARNING):
        assert command(model_dir, *arguments, "--resume", "--on-error", "record") == 0
    (said,) = [message for message in caplog.messages if message.startswith("kept ")]
    count = int(re.search(r"(\d) of 4 rows are kept", caplog.text)[1])  # type: ignore[index]
    assert said == f"kept {count} finished rows of {tmp_path / 'out.jsonl.unfinished'}, {4 - count} left"
    assert [bool(json.loads(line)["error"]) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        False, False, True, False,
    ]  # fmt: skip


def test_sigterm_is_an_interrupt(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": f"text-{i}"}) + "\n" for i in range(3000)))
    arguments = ["dataset", tmp_path / "in.jsonl", "--model", model_dir, "--device", "cpu", "--output",
                 tmp_path / "out", "--max-new-tokens", "100"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_async_batching", *map(str, arguments)],
        cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not list((tmp_path / "out.unfinished").glob("work/*.journal")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 130, error
    assert "interrupted" in error
    assert "the same command with --resume continues" in error


def test_help_teaches_by_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["dataset", "--help"])
    text = capsys.readouterr().out
    for words in ("--chat --max-new-tokens 200", "--resume", "--push-to-hub me/samples", "accelerate launch"):
        assert words in text


def test_three_rows_are_shown_at_the_end(model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    assert command(model_dir, written("jsonl", tmp_path / "in"), "--output", tmp_path / "out.jsonl",
                   "--max-new-tokens", 2) == 0  # fmt: skip
    done = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    shown = capsys.readouterr().out
    for i in range(3):
        assert f"row {i}, prompt: {done[i]['prompt']}\nrow {i}, completion: {done[i]['completion']}" in shown
    assert "row 3" not in shown


def test_tools_and_code_of_the_model(model_dir: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    rows = [{"prompt": "Hi", "tools": [{"type": "function", "function": {"name": "f"}}]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen: list[Any] = []
    own = PreTrainedTokenizerFast.apply_chat_template

    def apply_chat_template(self: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(named.get("tools"))
        return own(self, *arguments, **named)

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", apply_chat_template)
    arguments = [tmp_path / "in.jsonl", "--output", tmp_path / "out", "--tools-column", "tools", "--max-new-tokens", 2]
    assert command(model_dir, *arguments, "--trust-remote-code") == 0
    assert seen == [rows[0]["tools"]]
    own_code = tmp_path / "own"
    own_code.mkdir()
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}}
    (own_code / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        command(model_dir, tmp_path / "in.jsonl", "--output", tmp_path / "out2", "--model", own_code)
    error = capsys.readouterr().err
    assert "allow it to run with --trust-remote-code" in error
    assert len(error.splitlines()) == 1


def test_demo_goes_to_the_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from hf_async_batching.cli import demo as demo_command

    seen: list[Any] = []
    before, ends = sys.argv, [None, SystemExit(), SystemExit(0), SystemExit(3), SystemExit("no such model")]

    def run(page: str, run_name: str) -> None:
        seen.append((page, run_name, sys.argv[1:]))
        end = ends.pop(0)
        if end is not None:
            raise end

    monkeypatch.setattr(demo_command.runpy, "run_module", run)
    for code in (0, 0, 0, 3, 1):
        assert main(["demo", "--depth", "2"]) == code
        assert seen.pop() == ("demo.app", "__main__", ["--depth", "2"])
        assert sys.argv is before
    find_spec = demo_command.importlib.util.find_spec
    monkeypatch.setattr(
        demo_command.importlib.util, "find_spec", lambda name: None if name == "gradio" else find_spec(name)
    )
    assert main(["demo"]) == 1
    error = capsys.readouterr().err
    assert "pip install -e '.[demo]'" in error and len(error.splitlines()) == 1
    monkeypatch.setattr(demo_command.importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert "make demo" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "start the web page" not in capsys.readouterr().out, "it is listed where it works"
    with pytest.raises(SystemExit):
        main(["bench", "mix", "--what"])
    assert "unrecognized arguments: --what" in capsys.readouterr().err
