"""The examples, each run as a script in a process of its own, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import runpy
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from support.character_tokenizer import character_tokenizer
from support.tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_async_batching import get_manager

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))

# Processes come from a server that has imported what each of them needs.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["transformers.models.llama.modeling_llama", "datasets", "hf_async_batching"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Llama and a tokenizer whose tokens are characters."""
    folder = str(tmp_path_factory.mktemp("model"))
    tiny_model("Llama").save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def as_script(name: str, folder: str, arguments: tuple[str, ...]) -> None:
    """What `python examples/NAME ARGUMENTS` does in `folder`; runs in a process of its own."""
    output = os.open(Path(folder) / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=str(Path(folder) / "cache"), CUDA_VISIBLE_DEVICES="")
    sys.argv = [name, *arguments]
    names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    # The examples in which another library calls `generate`, and so nothing that they print tells who has answered.
    if (model := names["harness"].model if "harness" in names else names.get("model")) is not None:
        (Path(folder) / "steps").write_text(str(get_manager(model).stats().steps))


def started(name: str, folder: Path, *arguments: str) -> BaseProcess:
    process = PROCESSES.Process(target=as_script, args=(name, str(folder), arguments), daemon=True)
    process.start()
    return process


def text_of(folder: Path) -> str:
    return (folder / "output").read_text(encoding="utf-8") if (folder / "output").exists() else ""


def run(name: str, folder: Path, *arguments: str) -> str:
    """What the example prints, run in `folder`."""
    process = started(name, folder, *arguments)
    process.join(300)
    assert process.exitcode == 0, text_of(folder)[-4000:]
    return text_of(folder)


def steps(folder: Path) -> int:
    """How many steps the engine of the example's own model has made."""
    return int((folder / "steps").read_text())


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("name", NAMES)
def test_short_and_explained(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert text.count("\n") <= 40
    assert f"examples/{name} " in text.split('"""')[1], "the docstring says how to run it"
    assert 'parser.add_argument("--model", default="' in text
    assert f"({name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert f'"{name}"' in Path(__file__).read_text(encoding="utf-8"), "each example is run below"


def test_quickstart(model: str, tmp_path: Path) -> None:
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    out = run("quickstart.py", tmp_path, "--model", model, "--max-new-tokens", "5")
    for question in ("Name three fruits.", "Why is the sky blue?", "What is 17 plus 25?"):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        want = plain.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert f"{question}\n  {tokenizer.decode(want, skip_special_tokens=True)}\n" in out
    assert steps(tmp_path) >= 5


def test_streaming(model: str, tmp_path: Path) -> None:
    out = run("streaming.py", tmp_path, "--model", model, "--prompt", "Hello", "--max-new-tokens", "6")
    text, ended, first = out.splitlines()[-3:]
    count = re.fullmatch(r"\[(\d) tokens, ended by (?:length|eos)\]", ended)
    assert count is not None
    assert 0 < len(text) <= int(count[1])
    assert re.fullmatch(r"\[first token after \d+ ms\]", first)


@contextmanager
def server(model: str, folder: Path) -> Iterator[int]:
    with socket.create_server(("localhost", 0)) as free:
        port: int = free.getsockname()[1]
    process = started("asyncio_server.py", folder, "--model", model, "--port", str(port))
    try:
        while f"Listening on port {port}" not in text_of(folder):
            assert process.is_alive(), text_of(folder)[-4000:]
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.join()


def asked(port: int, question: str) -> socket.socket:
    connection = socket.create_connection(("localhost", port), timeout=120)
    connection.sendall(f"POST / HTTP/1.1\r\nContent-Length: {len(question)}\r\n\r\n{question}".encode())
    return connection


def test_asyncio_server(model: str, tmp_path: Path) -> None:
    with server(model, tmp_path) as port:
        with asked(port, "I leave early") as early, asked(port, "Why?") as one, asked(port, "How?") as other:
            assert early.recv(15) == b"HTTP/1.1 200 OK"
            early.close()
            answers = [connection.makefile("rb").read().decode() for connection in (one, other)]
        for answer in answers:
            head, _, text = answer.partition("\r\n\r\n")
            assert "Content-Type: text/plain" in head
            assert 0 < len(text) <= 200


def test_dataset_resume(model: str, tmp_path: Path) -> None:
    needs("datasets")
    out = run("dataset_resume.py", tmp_path, "--model", model, "--rows", "5")
    assert "What is 0 times 3? -> " in out
    assert out.endswith("5 rows are in run/data\n")
    assert len(list((tmp_path / "run" / "data").glob("*.parquet"))) >= 1


def test_several_gpus(model: str, tmp_path: Path) -> None:
    needs("datasets")
    out = run("several_gpus.py", tmp_path, "--model", model, "--rows", "4")
    assert "num_rows: 4" in out
    assert "completion_ids" in out


def test_lm_eval_harness(model: str, tmp_path: Path) -> None:
    needs("lm_eval")
    (tmp_path / "rows.json").write_text(json.dumps([{"question": q, "answer": "x"} for q in ("What", "Why", "How")]))
    task = {
        "task": "made_here",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["?"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "made_here.yaml").write_text(json.dumps(task))
    own = ("--tasks", "made_here", "--include-path", str(tmp_path / "tasks"))
    out = run("lm_eval_harness.py", tmp_path, "--model", model, *own, "--limit", "3", "--batch-size", "2")
    assert re.search(r"made_here.*exact_match", out)
    assert steps(tmp_path) >= 8


def test_trl_grpo(model: str, tmp_path: Path) -> None:
    needs("trl", "datasets")
    assert "'reward'" in run("trl_grpo.py", tmp_path, "--model", model, "--steps", "1")
    assert steps(tmp_path) >= 8


def test_custom_logits_processor(model: str, tmp_path: Path) -> None:
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    inputs = tokenizer("The best way to spend a summer day is", return_tensors="pt")
    new = plain.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    usual = tokenizer.decode(new, skip_special_tokens=True)
    letter = usual[0].lower()
    arguments = ("--letter", letter, "--max-new-tokens", "12")
    without, as_it_is = run("custom_logits_processor.py", tmp_path, "--model", model, *arguments).splitlines()[-2:]
    assert as_it_is == f"as it is: {usual}"
    text = without.removeprefix(f"without {letter!r}: ")
    assert 0 < len(text) <= 12
    assert letter not in text.lower()
