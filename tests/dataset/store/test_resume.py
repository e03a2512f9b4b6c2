"""`generate_dataset` with a folder: what is in it, what may change, what ends a run and what is kept then."""

from __future__ import annotations

import json
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from support.dataset_job import checksums
from support.forked_python import run_python
from support.tiny_models import tiny_model

from hf_async_batching import (
    BatchingConfig,
    DatasetRowError,
    GenerationManager,
    HfAsyncBatchingError,
    ResumeMismatchError,
    generate_dataset,
)
from hf_async_batching.dataset.to_folder import load_finished

NEW = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
TEXTS = [f"text-{i}" for i in range(25)]


@pytest.fixture
def dataset() -> Dataset:
    return Dataset.from_dict({"prompt": TEXTS, "n": range(25)})


class Counting:
    """A manager that counts what it serves, and can fail."""

    def __init__(self, manager: GenerationManager) -> None:
        self.manager = manager
        self.served = 0

    def __enter__(self) -> Counting:
        submit = self.manager.submit_requests

        def counted(requests: Any) -> Any:
            self.served += len(requests)
            return submit(requests)

        self.manager.submit_requests = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *args: object) -> None:
        del self.manager.submit_requests


def test_the_same_as_without_a_folder(manager: Any, tokenizer: Any, dataset: Dataset, tmp_path: Path) -> None:
    plain = generate_dataset(manager, dataset, tokenizer, **NEW)
    kept = generate_dataset(manager, dataset, tokenizer, resume_dir=tmp_path / "run", shard_rows=10, **NEW)
    assert kept.to_list() == plain.to_list()
    assert kept.features == plain.features
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["shards"] == [f"part-{i:06d}.parquet" for i in range(3)]
    assert (manifest["num_rows"], manifest["shard_rows"]) == (25, 10)
    assert list((tmp_path / "run" / "work").glob("*.journal")) == []
    loaded = load_dataset("parquet", data_dir=str(tmp_path / "run" / "data"), split="train")
    assert loaded.remove_columns("error").to_list() == plain.to_list()


def test_a_finished_run_is_only_read(manager: Any, tokenizer: Any, dataset: Dataset, tmp_path: Path) -> None:
    first = generate_dataset(manager, dataset, tokenizer, resume_dir=tmp_path / "run", **NEW)
    before = checksums(tmp_path / "run")
    with Counting(manager) as counting:
        again = generate_dataset(manager, dataset, tokenizer, resume_dir=str(tmp_path / "run"), **NEW)
    assert counting.served == 0
    assert again.to_list() == first.to_list()
    assert checksums(tmp_path / "run") == before


def test_a_resumed_run_says_what_it_has_kept(
    manager: Any, tokenizer: Any, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of a damaged file do not count."""
    folder = tmp_path / "run"

    def go() -> list[str]:
        caplog.clear()
        generate_dataset(manager, dataset, tokenizer, resume_dir=folder, shard_rows=10, **NEW)
        return [message for message in caplog.messages if message.startswith("kept")]

    assert go() == [], "a run that begins has kept nothing"
    assert go() == [f"kept 25 finished rows of {folder}, 0 left"]
    (folder / "data" / "part-000001.parquet").write_bytes(b"damaged")
    assert go() == [f"kept 15 finished rows of {folder}, 10 left"]


def test_streams(
    manager: Any, tokenizer: Any, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = dataset.to_iterable_dataset()
    done = generate_dataset(manager, stream, tokenizer, resume_dir=tmp_path / "run", shard_rows=10, **NEW)
    assert isinstance(done, IterableDataset)
    plain = generate_dataset(manager, dataset, tokenizer, **NEW).to_list()
    assert list(done) == plain
    caplog.clear()
    again = generate_dataset(manager, stream, tokenizer, resume_dir=tmp_path / "run", **NEW)
    assert list(again) == plain
    assert caplog.messages == [f"kept 25 finished rows of {tmp_path / 'run'}"], "a stream's length is not known"
    with pytest.raises(ResumeMismatchError, match="another number of rows than before: from row 0 on 25 then, 20 now"):
        generate_dataset(manager, stream.take(20), tokenizer, resume_dir=tmp_path / "run", shard_rows=10, **NEW)


def test_splits_have_folders(manager: Any, tokenizer: Any, dataset: Dataset, tmp_path: Path) -> None:
    splits = DatasetDict({"train": dataset.select(range(6)), "test": dataset.select(range(6, 10))})
    done = generate_dataset(manager, splits, tokenizer, resume_dir=tmp_path / "run", **NEW)
    assert {name: len(split) for name, split in done.items()} == {"train": 6, "test": 4}
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["test", "train"]


def test_an_empty_dataset(manager: Any, tokenizer: Any, dataset: Dataset, tmp_path: Path) -> None:
    done = generate_dataset(manager, dataset.select([]), tokenizer, resume_dir=tmp_path / "run", **NEW)
    assert len(done) == 0
    assert "completion" in done.column_names
    finished = load_finished(tmp_path / "run")
    assert (len(finished), finished.column_names) == (0, [*done.column_names, "error"])


def test_a_run_that_is_not_finished_is_not_loaded(manager: Any, tmp_path: Path) -> None:
    with pytest.raises(HfAsyncBatchingError, match="not finished"):
        load_finished(tmp_path)
    rows = Dataset.from_dict({"prompt": [[5, 6], [5, 7], [10**6]]})
    with pytest.raises(DatasetRowError):
        generate_dataset(manager, rows, resume_dir=tmp_path / "run", shard_rows=1, on_error="raise", **NEW)
    with pytest.raises(HfAsyncBatchingError, match="not finished"):
        load_finished(tmp_path / "run")


def test_what_has_changed_is_named(manager: Any, tokenizer: Any, dataset: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def go(data: Any = dataset, manager: Any = manager, tokenizer: Any = tokenizer, **changes: Any) -> Any:
        return generate_dataset(manager, data, tokenizer, resume_dir=folder, **{**NEW, **changes})

    def names(*expected: str, **changes: Any) -> None:
        with pytest.raises(ResumeMismatchError) as raised:
            go(**changes)
        for text in expected:
            assert text in str(raised.value)
        assert str(raised.value).count("\n  ") <= len(expected)

    go()
    go(on_error="record")  # says what becomes of a row, not what it is
    names("generation.max_new_tokens: 6 before, 7 now", max_new_tokens=7)
    names("generation.temperature: None before, 0.5 now", temperature=0.5)
    names("seed: 0 before, 1 now", seed=1)
    names("chat: False before, True now", chat=True)
    names("rows: 25 before, 24 now", data=dataset.select(range(24)))
    names("row_parameters.seed: None before, 'n' now".replace("'", ""), row_parameters={"seed": "n"})
    names("logprobs: False before, True now", "columns.completion_logprobs", "output_columns.logprobs", logprobs=True)
    names("prompt: prompt before, function", prompt=lambda row: row["prompt"])
    names("columns.m", "columns.n", data=dataset.rename_column("n", "m"))
    with GenerationManager(tiny_model("Llama", seed=1), BatchingConfig(max_rows=2)) as other:
        names("model.weights", manager=other)
    template = tokenizer.chat_template
    tokenizer.chat_template = template + " "
    names("tokenizer.chat_template")
    tokenizer.chat_template = template
    changed = Dataset.from_dict({"prompt": [*TEXTS[:20], "other", *TEXTS[21:]], "n": range(25)})
    with pytest.raises(ResumeMismatchError, match="rows 0 to 24 differ in 'prompt'"):
        go(data=changed)
    with pytest.raises(ValueError, match="`shard_rows` is 25"):
        go(shard_rows=5)
    go()


def test_functions_are_told_apart(manager: Any, tokenizer: Any, dataset: Dataset, tmp_path: Path) -> None:
    def make(ending: str) -> Any:
        return lambda row: row["prompt"] + ending

    generate_dataset(manager, dataset, tokenizer, prompt=make("?"), resume_dir=tmp_path / "run", **NEW)
    generate_dataset(manager, dataset, tokenizer, prompt=make("?"), resume_dir=tmp_path / "run", **NEW)
    with pytest.raises(ResumeMismatchError, match="prompt: function"):
        generate_dataset(manager, dataset, tokenizer, prompt=make("!"), resume_dir=tmp_path / "run", **NEW)


def test_other_folders(manager: Any, tokenizer: Any, dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="other files and no manifest"):
        generate_dataset(manager, dataset, tokenizer, resume_dir=tmp_path, **NEW)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(ResumeMismatchError, match="not a manifest"):
        generate_dataset(manager, dataset, tokenizer, resume_dir=folder, **NEW)


def test_two_runs_at_once_are_refused(manager: Any, tokenizer: Any, dataset: Dataset, tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def prompt(row: dict[str, Any]) -> str:
        begun.set()
        go_on.wait(60)
        return str(row["prompt"])

    arguments = {"prompt": prompt, "resume_dir": tmp_path / "run", **NEW}
    first = threading.Thread(target=generate_dataset, args=(manager, dataset, tokenizer), kwargs=arguments)
    first.start()
    assert begun.wait(60)
    with pytest.raises(ResumeMismatchError, match="another process works in"):
        generate_dataset(manager, dataset, tokenizer, **arguments)
    go_on.set()
    first.join()
    assert len(generate_dataset(manager, dataset, tokenizer, **arguments)) == 25


def test_a_row_that_raises_leaves_what_is_done(
    manager: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = Dataset.from_dict({"prompt": [*TEXTS, None, *TEXTS]})
    arguments = {"resume_dir": tmp_path / "run", "window": 4, **NEW}
    with pytest.raises(DatasetRowError, match="row 25"):
        generate_dataset(manager, bad, tokenizer, **arguments)
    assert "rows are kept in" in caplog.text
    assert f"resume_dir='{tmp_path / 'run'}'" in caplog.text
    kept = int(re.search(r"(\d+) of 51 rows are kept", caplog.text)[1])  # type: ignore[index]
    with Counting(manager) as counting:
        done = generate_dataset(manager, bad, tokenizer, on_error="record", **arguments)
    assert f"kept {kept} finished rows of {tmp_path / 'run'}, {51 - kept} left" in caplog.messages
    assert counting.served < 51
    assert [i for i, error in enumerate(done["error"]) if error] == [25]
    fresh = generate_dataset(manager, bad, tokenizer, on_error="record", **NEW)
    assert done.to_list() == fresh.to_list()


INTERRUPTED = """
import logging, os, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # the process that started the tests may ignore it
from support.dataset_job import *
logging.basicConfig()
def callback(progress):
    if progress.rows >= 20:
        os.kill(os.getpid(), signal.SIGINT)
model = tiny_model("Llama")
with GenerationManager(model, BatchingConfig(max_rows=4, page_size=16, max_batch_tokens=32)) as manager:
    generate_dataset(
        manager, make_dataset(400), character_tokenizer(), resume_dir=sys.argv[1], on_error="record", shard_rows=50,
        max_new_tokens=24, do_sample=False, eos_token_id=None, callback=callback,
    )
"""


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path: Path) -> None:
    done = run_python(INTERRUPTED, str(tmp_path / "run"))
    # Usually by the signal; libraries that run code of their own at exit make it a plain failure.
    assert done.returncode in (-signal.SIGINT, 1), done.stderr
    assert "KeyboardInterrupt" in done.stderr
    message = next(line for line in done.stderr.splitlines() if "interrupted" in line)
    kept = int(message.split("interrupted: ")[1].split(" of 400 rows are kept")[0])
    assert kept >= 20
    assert "call again with the same arguments" in message
    assert f"resume_dir='{tmp_path / 'run'}'" in message


FULL = """
import resource, signal, sys
from support.dataset_job import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def attempt(folder, limit):
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        print(len(run({"folder": folder, "rows": 120, "shard_rows": 60, "new": 4})))
    except OSError as error:
        print(type(error).__name__, error)
    print(checksums(folder))
for name, limit in (("whole", 0), ("full", 9000), ("full", 0)):
    print("---", flush=True)
    assert ended(in_child(lambda: attempt(os.path.join(sys.argv[1], name), limit))) == 0
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """The system refuses to let files grow: an error that says so, nothing that was written is lost."""
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = run_python(FULL, str(tmp_path), **cache)
    _, whole, full, again = done.stdout.split("---\n")
    assert whole.startswith("120\n"), done.stderr
    assert "the disk of `resume_dir` is full" in full
    assert "start again" in full
    assert again == whole


def test_parquet_shards_are_whole_and_drafts_are_removed(
    manager: Any, tokenizer: Any, dataset: Dataset, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    generate_dataset(manager, dataset, tokenizer, resume_dir=folder, shard_rows=10, **NEW)
    before = checksums(folder)
    (folder / "data" / "part-000001.parquet").rename(folder / "data" / ".part-000001.parquet.77.tmp")
    with Counting(manager) as counting:
        generate_dataset(manager, dataset, tokenizer, resume_dir=folder, **NEW)
    assert counting.served == 10
    assert checksums(folder) == before
    assert pq.read_metadata(folder / "data" / "part-000002.parquet").num_rows == 5
