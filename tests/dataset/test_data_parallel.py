"""Two processes that share a dataset, as `accelerate launch` starts them; one of them is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.dataset_job import checksums, make_dataset, rows_kept, run

from hf_async_batching import HfAsyncBatchingError, ResumeMismatchError
from hf_async_batching.dataset.store import resume_store
from hf_async_batching.dataset.store.ranks import Ranks, find_ranks

ROOT = Path(__file__).parent.parent.parent


# `--multi_gpu` is the launcher of several processes; nothing in it or in these needs a GPU.
def launch(folder: Path, port: int, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(port), "-m", "support.dataset_ranks", str(folder)]
    own = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    own["HF_DATASETS_CACHE"] = str(folder.parent / "cache")
    return subprocess.run(
        command,
        env={**os.environ, **own, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_accelerate_launch_with_a_rank_that_dies(tmp_path: Path, unused_port: int) -> None:
    folder = tmp_path / "ranks"
    died = launch(folder, unused_port, KILL_RANK="1")
    assert died.returncode != 0
    assert "has 150 rows" not in died.stdout
    kept = rows_kept(folder)
    assert kept >= 20, died.stderr
    done = launch(folder, unused_port)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank} of 2 has 150 rows, the last one 149" in done.stdout
    shard_rows = 150 // (2 * 16)
    run({"folder": tmp_path / "alone", "rows": 150, "shard_rows": shard_rows, "new": 12})
    assert checksums(folder) == checksums(tmp_path / "alone")


def test_another_number_of_processes_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of 2 never comes: rank 0 says so, and one process alone does the rest."""
    work: dict[str, Any] = {"folder": tmp_path / "run", "rows": 60, "shard_rows": 10, "new": 4}
    monkeypatch.setattr(resume_store, "DEAD_SECONDS", 0.3)
    with pytest.raises(HfAsyncBatchingError, match=r"3 of 6 shards .* are missing, .* of rank 1; start again"):
        run({**work, "rank": 0, "world_size": 2})
    assert len(run(work)) == 60
    run({**work, "folder": tmp_path / "alone"})
    assert checksums(tmp_path / "run") == checksums(tmp_path / "alone")


def test_each_rank_alone_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As jobs of an array do it, with a stream whose length is not known in advance."""
    work: dict[str, Any] = {"folder": tmp_path / "run", "rows": 95, "shard_rows": 10, "new": 4, "stream": True}
    monkeypatch.setattr(resume_store, "DEAD_SECONDS", 0.1)
    for rank in (2, 0):
        with pytest.raises(HfAsyncBatchingError, match="start again"):
            run({**work, "rank": rank, "world_size": 3})
    done = run({**work, "rank": 1, "world_size": 3})
    assert [row["number"] for row in done] == list(range(95))
    assert [row["prompt"] for row in done] == make_dataset(95)["prompt"][:]


def test_other_data_on_another_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume_store, "DEAD_SECONDS", 0.1)
    work: dict[str, Any] = {"folder": tmp_path / "run", "rows": 60, "shard_rows": 10, "new": 2, "world_size": 2}
    with pytest.raises(HfAsyncBatchingError):
        run({**work, "rank": 0})
    with pytest.raises(ResumeMismatchError, match="rows: 60 before, 50 now"):
        run({**work, "rank": 1, "rows": 50})


def test_ranks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert find_ranks(None, None) == Ranks(0, 1)
    assert find_ranks(2, 3) == Ranks(2, 3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert find_ranks(None, None) == Ranks(1, 4)
    assert find_ranks(0, 1) == Ranks(0, 1)
    assert all(sum(Ranks(rank, 3).owns(shard) for rank in range(3)) == 1 for shard in range(10))
