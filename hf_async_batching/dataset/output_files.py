"""What `--output` of the command line can be."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from hf_async_batching.dataset.files import sync_folder, write_whole

_FILES = (".parquet", ".jsonl", ".json", ".csv")


class OutputError(Exception):
    """What a person can put right; the message says how."""


def check_output(output: Path) -> None:
    """Refuse what cannot be written, before anything is computed.

    Raises:
        OutputError: Says why.
    """
    if output.suffix.lower() in _FILES:
        if output.exists():
            raise OutputError(f"--output: {output} is there already; choose another name or delete it")
    elif output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise OutputError(f"--output: {output} is there already; choose another name, or an empty folder")
    folder = output.parent
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise OutputError(f"--output: {folder} cannot be written")


def write_output(dataset: Any, work: Path, output: Path, *, drop_errors: bool) -> Any:
    """Write a finished run. Returns what was written, as a `Dataset`.

    Args:
        dataset: What `generate_dataset` returned.
        work: Its folder.
        output: A folder or a file.
        drop_errors: Whether the column of errors, which is None throughout, is left out of a folder's files.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    kind = output.suffix.lower()
    if hasattr(dataset, "num_rows"):
        finished = dataset
    else:
        from datasets import Dataset

        # A stream's shards are finished files by now.
        finished = Dataset.from_parquet([str(path) for path in sorted(work.glob("data/*.parquet"))])
        finished = finished.remove_columns("error") if drop_errors and "error" in finished.column_names else finished
    if kind == ".parquet":
        write_whole(output, lambda path: finished.to_parquet(str(path)))
    elif kind in (".jsonl", ".json"):
        write_whole(output, lambda path: finished.to_json(str(path), lines=True, force_ascii=False))
    elif kind == ".csv":
        write_whole(output, lambda path: finished.to_csv(str(path)))
    else:
        _write_folder(finished, output)
    return finished


def _write_parquet(dataset: Any, path: Path) -> None:
    dataset.to_parquet(str(path))


def _write_folder(dataset: Any, output: Path) -> None:
    """Parquet files named as `load_dataset` expects them, all or none."""
    draft = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    draft.mkdir()
    try:
        count = max(1, -(-dataset.num_rows // 10_000))
        for index in range(count):
            part = dataset.shard(count, index, contiguous=True)
            name = f"train-{index:05d}-of-{count:05d}.parquet"
            write_whole(draft / name, partial(_write_parquet, part))
        if output.is_dir():
            output.rmdir()
        os.replace(draft, output)
        sync_folder(output.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
