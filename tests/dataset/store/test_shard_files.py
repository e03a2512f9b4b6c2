"""Which files of a run's folder count: the manifest and the checksums decide, never a name."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from support.dataset_job import checksums

from hf_async_batching import HfAsyncBatchingError, generate_dataset
from hf_async_batching.dataset.store import resume_store
from hf_async_batching.dataset.store.ranks import RankLock
from hf_async_batching.dataset.store.shard_files import shard_number

NEW: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "shard_rows": 4}
ROWS = [{"prompt": f"text-{i}", "n": i} for i in range(10)]


def run(manager: Any, tokenizer: Any, folder: Path, rows: Any = ROWS, **arguments: Any) -> list[dict[str, Any]]:
    return list(
        generate_dataset(manager, Dataset.from_list(rows), tokenizer, resume_dir=folder, **{**NEW, **arguments})
    )


def shard(folder: Path, number: int) -> Path:
    return folder / "data" / f"part-{number:06d}.parquet"


def swap(folder: Path) -> None:
    shard(folder, 0).rename(folder / "other")
    shard(folder, 1).rename(shard(folder, 0))
    (folder / "other").rename(shard(folder, 1))


def shorten(folder: Path) -> None:
    pq.write_table(pq.read_table(shard(folder, 1)).slice(0, 3), shard(folder, 1))


def rewrite(folder: Path) -> None:
    table = pq.read_table(shard(folder, 1))
    pq.write_table(table.set_column(1, "n", [[-1] * 4]).cast(table.schema), shard(folder, 1))


def without_metadata(folder: Path) -> None:
    pq.write_table(pq.read_table(shard(folder, 1)).replace_schema_metadata(None), shard(folder, 1))


DAMAGES: dict[str, tuple[Callable[[Path], object], list[int]]] = {
    "swapped": (swap, [0, 1]),
    "copied": (lambda folder: shutil.copy(shard(folder, 0), shard(folder, 1)), [1]),
    "short": (shorten, [1]),
    "truncated": (lambda folder: os.truncate(shard(folder, 1), 300), [1]),
    "empty": (lambda folder: os.truncate(shard(folder, 2), 0), [2]),
    "rewritten": (rewrite, [1]),
    "without metadata": (without_metadata, [1]),
}


def of_files(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings about the folder's files; how many rows a run kept is told as well."""
    records = [one for one in caplog.records if one.levelno == logging.WARNING]
    return [one.getMessage() for one in records if one.name.endswith("shard_files")]


@pytest.mark.parametrize("logged", [True, False], ids=["with checksums", "without checksums"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_are_computed_again(
    manager: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, logged: bool
) -> None:
    folder = tmp_path / "run"
    before = run(manager, tokenizer, folder)
    files = checksums(folder)
    if not logged:
        # As if its writer had been killed before it noted the checksums.
        if damage == "rewritten":
            pytest.skip("without a checksum, nothing tells")
        (folder / "work" / "shards-0.log").unlink()
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "checksums": None, "shards": None}))
    act, damaged = DAMAGES[damage]
    act(folder)
    assert run(manager, tokenizer, folder) == before
    assert checksums(folder) == files
    warnings = of_files(caplog)
    assert len(warnings) == len(damaged)
    for number in damaged:
        assert sum(f"part-{number:06d}.parquet is damaged" in text for text in warnings) == 1
    caplog.clear()
    assert run(manager, tokenizer, folder) == before
    assert not of_files(caplog)


def test_another_runs_shard(manager: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = run(manager, tokenizer, tmp_path / "a")
    run(manager, tokenizer, tmp_path / "b", [{"prompt": f"other-{i}", "n": i} for i in range(10)], seed=1)
    (tmp_path / "a" / "work" / "shards-0.log").unlink()
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({**manifest, "checksums": None}))
    shutil.copy(shard(tmp_path / "b", 1), shard(tmp_path / "a", 1))
    assert run(manager, tokenizer, tmp_path / "a") == before
    assert "it is another shard, or another run's" in caplog.text


def test_folders_of_earlier_versions(
    manager: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    before = run(manager, tokenizer, folder)
    (folder / "work" / "shards-0.log").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksums"], manifest["signed"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    without_metadata(folder)
    assert run(manager, tokenizer, folder) == before
    assert not of_files(caplog)


STRAYS = ["part-000001 (1).parquet", "part-000003.parquet", "part-1.parquet", "part-000001.parquet.bak", "notes.txt"]


def test_stray_files_are_ignored_and_named_once(
    manager: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    before = run(manager, tokenizer, folder)
    for name in STRAYS:
        shutil.copy(shard(folder, 1), folder / "data" / name)
    shutil.copy(folder / "work" / "inputs-0.log", folder / "work" / "inputs-0 (1).log")
    (folder / "work" / "part-000009 (2).journal").write_text("?")
    (folder / "data" / ".part-000001 (1).parquet.tmp").write_text("?")
    assert run(manager, tokenizer, folder) == before
    assert len(of_files(caplog)) == 1
    assert all(name in caplog.text for name in STRAYS)
    assert shard(folder, 0).name not in caplog.text
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["shards"] == list(manifest["checksums"]) == [shard(folder, i).name for i in range(3)]


def test_a_stream(manager: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def go() -> list[Any]:
        stream = Dataset.from_list(ROWS).to_iterable_dataset()
        return list(generate_dataset(manager, stream, tokenizer, resume_dir=tmp_path / "run", **NEW))

    before = go()
    os.truncate(shard(tmp_path / "run", 2), 99)
    shutil.copy(shard(tmp_path / "run", 1), shard(tmp_path / "run", 3))
    assert go() == before
    assert "part-000002.parquet is damaged" in caplog.text
    assert "part-000003.parquet: not shards" in caplog.text


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?", "[!a]", "{a,b}", "a b#%20", "x[7]", "**"])
def test_folders_with_the_signs_of_patterns(manager: Any, tokenizer: Any, tmp_path: Path, name: str) -> None:
    other = run(manager, tokenizer, tmp_path / "run1", [{"prompt": "other", "n": 1}] * 10)
    for _ in range(2):
        done = run(manager, tokenizer, tmp_path / name)
        assert [row["prompt"] for row in done] == [row["prompt"] for row in ROWS]
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    streamed = generate_dataset(manager, stream, tokenizer, resume_dir=tmp_path / f"s{name}", **NEW)
    assert list(streamed) == done
    assert run(manager, tokenizer, tmp_path / "run1", [{"prompt": "other", "n": 1}] * 10) == other


def test_ranks_look_at_each_others_shards(
    manager: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 must not take a damaged shard of rank 1 for done; the next process of that rank computes it again."""
    folder = tmp_path / "run"
    monkeypatch.setattr(resume_store, "DEAD_SECONDS", 0.3)
    with pytest.raises(HfAsyncBatchingError, match=r"1 of 3 shards .* no process of rank 1"):
        run(manager, tokenizer, folder, rank=0, world_size=2)
    run(manager, tokenizer, folder, rank=1, world_size=2)
    before, files = run(manager, tokenizer, folder, rank=0, world_size=2), checksums(folder)
    shorten(folder)
    with pytest.raises(HfAsyncBatchingError, match=r"1 of 3 shards .* no process of rank 1"):
        run(manager, tokenizer, folder, rank=0, world_size=2)
    assert caplog.text.count("part-000001.parquet is damaged") == 1
    assert run(manager, tokenizer, folder, rank=1, world_size=2) == before
    assert run(manager, tokenizer, folder, rank=0, world_size=2) == before
    assert checksums(folder) == files
    assert run(manager, tokenizer, folder) == before


def test_the_lock_is_let_go_where_a_run_cannot_start(
    manager: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise OSError("no logs")

    with monkeypatch.context() as patched:
        patched.setattr(resume_store, "InputLog", broken)
        with pytest.raises(OSError, match="no logs") as raised:
            run(manager, tokenizer, tmp_path / "run")
    RankLock(tmp_path / "run" / "work", 0).release()
    assert raised.tb is not None


def test_names_of_shards() -> None:
    assert [shard_number(name) for name in ("part-000012.parquet", "part-1234567.parquet")] == [12, 1234567]
    assert not [name for name in (*STRAYS[::2], "part-0000001.parquet") if shard_number(name) is not None]


def test_others_can_read_the_folder(manager: Any, tokenizer: Any, tmp_path: Path) -> None:
    before = run(manager, tokenizer, tmp_path / "run")
    data = str(tmp_path / "run" / "data")
    loaded = load_dataset("parquet", data_dir=data, split="train", cache_dir=str(tmp_path))
    assert list(loaded.remove_columns("error")) == before
