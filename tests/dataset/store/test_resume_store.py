"""The folder's own thread: when rows are brought to the disk, what is closed, who writes the manifest."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Value

from hf_async_batching import HfAsyncBatchingError, ResumeMismatchError
from hf_async_batching.dataset.rows.output_columns import OutputColumns
from hf_async_batching.dataset.rows.row import Completion, RowBlock, RowResult
from hf_async_batching.dataset.store import resume_store
from hf_async_batching.dataset.store.journal import read_journal
from hf_async_batching.dataset.store.manifest import read_manifest
from hf_async_batching.dataset.store.ranks import Ranks
from hf_async_batching.dataset.store.resume_store import ResumeStore

COLUMNS = OutputColumns(several=False, text=False, logprobs=False)


def make(folder: Path, *, rank: int = 0, size: int = 1, num_rows: int | None = 10) -> ResumeStore:
    features = Features({"n": Value("int64"), **COLUMNS.features()})
    return ResumeStore(
        folder, {"what": "this"}, features, COLUMNS, num_rows=num_rows, shard_rows=4, ranks=Ranks(rank, size)
    )


def chunk(start: int = 0, count: int = 10) -> RowBlock:
    return RowBlock(start, (), pa.table({"n": pa.array(range(start, start + count), pa.int64())}))


def result(index: int) -> RowResult:
    return RowResult(index, 1, [Completion([index], "eos")])


def wait_for(happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.005)
    return happened()


def open_files(folder: Path) -> list[str]:
    paths = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    return [path for path in paths if path.startswith(str(folder))]


def complete(store: ResumeStore, rows: int = 10) -> Any:
    wanted = store.read(chunk(0, rows))
    store.read_all(rows)
    for index in wanted:
        store.add(result(index))
    return store.finish()


@pytest.mark.parametrize(("seconds", "size"), [(0.01, 8 << 20), (1000.0, 1)], ids=["by time", "by size"])
def test_rows_are_brought_to_the_disk_while_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, size: int
) -> None:
    monkeypatch.setattr(resume_store, "SYNC_SECONDS", seconds)
    monkeypatch.setattr(resume_store, "SYNC_BYTES", size)
    synced: set[str] = set()
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.add(Path(os.path.realpath(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    store = make(tmp_path / "run")
    store.read(chunk())
    assert wait_for(lambda: store._orders.empty())
    monkeypatch.setattr(os, "fsync", noted)
    store.add(result(0))
    expected = {"part-000000.journal", "inputs-0.log"}
    assert wait_for(lambda: expected <= synced)
    # Not once a row.
    if size > 1:
        monkeypatch.setattr(resume_store, "SYNC_SECONDS", 1000.0)
        time.sleep(0.05)
        synced.clear()
        store.add(result(1))
        assert wait_for(lambda: store._orders.empty())
        time.sleep(0.05)
        assert not synced
    assert store.abort([]) == 1 + (size > 1)
    assert "part-000000.journal" in synced


def test_rows_of_files_and_of_journals_are_found(tmp_path: Path) -> None:
    """Here of shards of 4, 4 and 2 rows: one is a file, one has a journal."""
    store = make(tmp_path / "run")
    assert (store.resumed, store.rows_found()) == (False, 0)
    store.read(chunk())
    for index in (0, 1, 2, 3, 5, 6):
        store.add(result(index))
    assert store.abort([]) == 6
    again = make(tmp_path / "run")
    assert (again.resumed, again.rows_found()) == (True, 6)
    again.read(chunk())
    assert again.abort([]) == 6
    (tmp_path / "run" / "data" / "part-000000.parquet").write_bytes(b"damaged")
    damaged = make(tmp_path / "run")
    assert damaged.rows_found() == 2
    damaged.abort([])


@pytest.mark.parametrize("how", ["abort", "finish"])
def test_nothing_stays_open(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "run"
    store = make(folder)
    store.read(chunk())
    store.add(result(0))
    store.add(result(5))
    assert wait_for(lambda: len(open_files(folder / "work")) >= 5)  # two journals, two logs, the lock
    if how == "abort":
        assert store.abort([result(6)]) == 3
    else:
        store.read_all(10)
        for index in set(range(10)) - {0, 5}:
            store.add(result(index))
        assert [file.path.name for file in store.finish()] == [f"part-{i:06d}.parquet" for i in range(3)]
    assert open_files(folder) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "hf_async_batching-write"]


def test_a_row_that_cannot_be_stored_does_not_hide_the_others(tmp_path: Path) -> None:
    """What is left when a run ends is written, and what is wrong with it is told once."""
    store = make(tmp_path / "run")
    store.read(chunk())
    store.add(result(0))
    assert store.abort([result(1), result(4)]) == 3
    work = tmp_path / "run" / "work"
    kept = [r["index"] for name in (0, 1) for r in read_journal(work / f"part-00000{name}.journal")]
    assert kept == [0, 1, 4]


def test_only_rank_0_writes_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr(resume_store, "DEAD_SECONDS", 0.2)
    monkeypatch.setattr(resume_store, "_WAIT_SECONDS", 0.05)
    first = make(folder, rank=0, size=2)
    with pytest.raises(HfAsyncBatchingError, match="1 of 3 shards"):
        complete(first)
    first.abort([])
    complete(make(folder, rank=1, size=2))
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.shards is None
    complete(make(folder, rank=0, size=2))
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.shards == [f"part-{i:06d}.parquet" for i in range(3)]
    assert manifest.num_rows == 10


def test_one_rank_writes_the_manifest(tmp_path: Path) -> None:
    complete(make(tmp_path / "run", num_rows=None))
    manifest = read_manifest(tmp_path / "run")
    assert manifest is not None
    assert (manifest.num_rows, len(manifest.shards or ())) == (10, 3)


def test_a_rank_that_comes_back_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 waits for as long as rank 1 works, however long that is."""
    folder = tmp_path / "run"
    monkeypatch.setattr(resume_store, "DEAD_SECONDS", 0.3)
    monkeypatch.setattr(resume_store, "_WAIT_SECONDS", 0.02)
    other = make(folder, rank=1, size=2)
    other.read(chunk())
    other.read_all(10)

    def later() -> None:
        time.sleep(0.8)
        for index in range(4, 8):
            other.add(result(index))
        assert len(other.finish()) == 3

    thread = threading.Thread(target=later)
    first = make(folder, rank=0, size=2)
    thread.start()
    assert len(complete(first)) == 3
    thread.join()


def test_rows_of_other_ranks_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    other = make(folder, rank=1, size=2)
    assert other.read(chunk()) == [4, 5, 6, 7]
    other.read_all(10)
    for index in range(4, 8):
        other.add(result(index))
    assert other.abort([]) == 4
    mine = make(folder, rank=0, size=2)
    assert mine.read(chunk()) == [0, 1, 2, 3, 8, 9]
    mine.add(result(8))
    assert mine.abort([]) == 5
    again = make(folder)
    assert again.read(chunk()) == [0, 1, 2, 3, 9]
    assert again.abort([]) == 5


def test_a_writer_that_fails_says_so_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path / "run")
    store.read(chunk())
    (tmp_path / "run" / "work" / "part-000000.journal").mkdir()
    store.add(result(0))
    assert wait_for(lambda: store._error is not None)
    with pytest.raises(OSError, match="part-000000"):
        store.add(result(1))
    with pytest.raises(OSError, match="part-000000"):
        store.finish()
    assert store.abort([]) == 0


def test_journals_that_were_swapped_do_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    store = make(folder)
    store.read(chunk())
    for index in (0, 1, 5):
        store.add(result(index))
    assert store.abort([]) == 3
    first, second = (folder / "work" / f"part-00000{i}.journal" for i in (0, 1))
    first.rename(folder / "work" / "kept")
    second.rename(first)
    (folder / "work" / "kept").rename(second)
    store = make(folder)
    assert store.read(chunk()) == list(range(10))
    store.abort([])
    files = complete(make(folder))
    assert [pq.read_table(file.path)["completion_ids"].to_pylist() for file in files] == [
        [[i] for i in range(start, min(start + 4, 10))] for start in (0, 4, 8)
    ]


def test_more_and_fewer_rows(tmp_path: Path) -> None:
    complete(make(tmp_path / "run", num_rows=None))
    store = make(tmp_path / "run", num_rows=None)
    store.read(chunk())
    with pytest.raises(ResumeMismatchError, match="more rows than before: 10 then"):
        store.read(chunk(10, 2))
    with pytest.raises(ResumeMismatchError, match="10 before, 9 now"):
        store.read_all(9)
    store.abort([])


@pytest.mark.parametrize(
    ("rows", "ranks", "size"),
    [
        *((None, 1, 1000), (None, 4, 1000), (0, 1, 1), (7, 1, 7), (1000, 1, 1000), (5000, 1, 1000)),
        *((0, 2, 1), (31, 2, 1), (320, 2, 10), (31_999, 2, 999), (64_000, 2, 1000)),
    ],
)
def test_rows_per_shard(rows: int | None, ranks: int, size: int) -> None:
    """One process writes few files; each of several gets about 16."""
    assert resume_store._shard_rows(rows, ranks) == size
