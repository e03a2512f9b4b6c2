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


def job(action: str, folder: Path, **arguments: Any) -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder.parent / "cache"),
    }
    command = [
        sys.executable,
        "-m",
        "support.dataset_job",
        json.dumps({"action": action, "folder": str(folder), **arguments}),
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["status"] == 0, done.stderr
    return result


def check_rows(folder: Path, rows: int) -> None:
    """No row twice, none missing, and what was read is what is there."""
    table = pq.read_table(sorted(folder.glob("data/part-*.parquet")))
    given = make_dataset(rows)
    assert table.select(given.column_names).to_pylist() == given.to_list()
    errors = table.column("error").to_pylist()
    assert [error is None for error in errors] == [prompt is not None for prompt in given["prompt"]]


@pytest.mark.parametrize(("stream", "kills"), [(False, 10), (True, 4)])
def test_random_moments(tmp_path: Path, stream: bool, kills: int) -> None:
    work = {"rows": 120, "shard_rows": 25, "new": 4, "window": 24, "stream": stream, "slow": 0.004}
    killed = job("kill", tmp_path / "killed", kills=kills, within=0.05, seed=kills, **work)
    assert killed["files"] == killed["undisturbed"]
    assert len(killed["files"]) == 5
    check_rows(tmp_path / "killed", 120)
    moments = killed["rows_at_kills"]
    assert moments == sorted(moments), "a kill cost rows that were kept"
    assert len(set(moments)) > kills // 2, "hardly any kill came while rows were finished"
    assert moments[-1] > 40


def test_before_and_after_each_call_that_writes(tmp_path: Path) -> None:
    work = {"rows": 40, "shard_rows": 15, "new": 2}
    killed = job("calls", tmp_path / "killed", **work)
    assert killed["files"] == killed["undisturbed"]
    assert killed["kills"] > 8
    check_rows(tmp_path / "killed", 40)
