"""A run that is killed at any moment and started again ends with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.dataset_job import make_dataset

ROOT = Path(__file__).parents[3]


STREAMS = [(False, 10), (True, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    """What became of each run, by the name of its folder. One process forks all of them: imports take longer."""
    work = {"rows": 120, "shard_rows": 25, "new": 4, "window": 24, "slow": 0.004, "action": "kill", "within": 0.05}
    jobs = [
        {**work, "folder": str(folder / f"stream {stream}"), "stream": stream, "kills": kills, "seed": kills}
        for stream, kills in STREAMS
    ]
    jobs.append({"folder": str(folder / "calls"), "action": "calls", "rows": 40, "shard_rows": 15, "new": 2})
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, "-m", "support.dataset_job", json.dumps(jobs)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = {
        name: json.loads(line)
        for name, line in zip(["stream False", "stream True", "calls"], done.stdout.splitlines()[-3:], strict=True)
    }
    assert [result["status"] for result in results.values()] == [0, 0, 0], done.stderr
    return results


def check_rows(folder: Path, rows: int) -> None:
    """No row twice, none missing, and what was read is what is there."""
    table = pq.read_table(sorted(folder.glob("data/part-*.parquet")))
    given = make_dataset(rows)
    assert table.select(given.column_names).to_pylist() == given.to_list()
    errors = table.column("error").to_pylist()
    assert [error is None for error in errors] == [prompt is not None for prompt in given["prompt"]]


@pytest.mark.parametrize(("stream", "kills"), STREAMS)
def test_random_moments(results: dict[str, Any], folder: Path, stream: bool, kills: int) -> None:
    killed = results[f"stream {stream}"]
    assert killed["files"] == killed["undisturbed"]
    assert len(killed["files"]) == 5
    check_rows(folder / f"stream {stream}", 120)
    moments = killed["rows_at_kills"]
    assert moments == sorted(moments), "a kill cost rows that were kept"
    assert len(set(moments)) > kills // 2, "hardly any kill came while rows were finished"
    assert moments[-1] > 40


def test_before_and_after_each_call_that_writes(results: dict[str, Any], folder: Path) -> None:
    killed = results["calls"]
    assert killed["files"] == killed["undisturbed"]
    assert killed["kills"] > 8
    check_rows(folder / "calls", 40)
