"""Writes `--output` of the command line: a folder or a file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hf_async_batching.dataset.store.atomic_files import sync_folder, write_whole
from hf_async_batching.dataset.text_files import binary_columns, text_kind, write_text
from hf_async_batching.dataset.to_folder import load_finished

# Endings that people give to files, not to folders.
_OTHER_FILES = {
    *(
        ".arrow",
        ".bz2",
        ".db",
        ".feather",
        ".gz",
        ".htm",
        ".html",
        ".ipc",
        ".md",
        ".orc",
        ".pickle",
        ".pkl",
        ".sqlite",
    ),
    *(".tar", ".txt", ".xls", ".xlsx", ".xml", ".xz", ".yaml", ".yml", ".zip", ".zst"),
}
_ENDED = "; --resume continues only a run that has not ended"
_NAMES = ".parquet, .jsonl, .json, .csv and .tsv, the last four also with .gz"


class OutputError(Exception):
    """A mistake that the user can correct; the message says how."""


def check_output(output: Path) -> None:
    """Refuse an output that cannot be written, before anything is computed.

    Raises:
        OutputError: The output exists, its kind is unknown, or its folder is not writable.
    """
    ending = output.suffix.lower()
    if _is_file(output):
        if output.exists():
            raise OutputError(f"--output: {output} is there already; choose another name or delete it{_ENDED}")
    elif ending in _OTHER_FILES:
        raise OutputError(f"--output: {output}: no files of this kind are written; files are {_NAMES}")
    elif output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise OutputError(f"--output: {output} is there already; choose another name, or an empty folder{_ENDED}")
    folder = output.parent
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise OutputError(f"--output: {folder} cannot be written")


def check_columns(output: Path, features: Mapping[str, Any] | None) -> None:
    """Refuse columns that the output cannot hold, before anything is computed.

    Args:
        output: A folder or a file.
        features: Features of the input's columns; None if unknown.

    Raises:
        OutputError: The output cannot hold some columns; the message names them.
    """
    binary = binary_columns(features or {}) if text_kind(output) else []
    if binary:
        raise OutputError(
            f"--output: {output.name} cannot hold bytes, and column {', '.join(map(repr, binary))} has them; write a "
            ".parquet file or a folder"
        )


def _is_file(output: Path) -> bool:
    return output.suffix.lower() == ".parquet" or text_kind(output) is not None


def write_output(dataset: Any, work: Path, output: Path, *, drop_errors: bool) -> Any:
    """Write a finished run. Returns the written rows as a `Dataset`.

    Args:
        dataset: The result of `generate_dataset`.
        work: The folder of the run.
        output: A folder or a file.
        drop_errors: Whether to leave out the error column, which then has only None.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    finished = dataset
    if not hasattr(dataset, "num_rows"):
        # The shards of a stream are complete files now.
        finished = load_finished(work)
        finished = finished.remove_columns("error") if drop_errors and "error" in finished.column_names else finished
    kind = text_kind(output)
    if kind is not None:
        compressed = output.suffix.lower() == ".gz"
        write_whole(output, lambda path: write_text(finished, path, kind, compressed=compressed))
    elif _is_file(output):
        write_whole(output, lambda path: finished.to_parquet(str(path)))
    else:
        _write_folder(finished, output)
    return finished


def _write_parquet(dataset: Any, path: Path) -> None:
    dataset.to_parquet(str(path))


def _write_folder(dataset: Any, output: Path) -> None:
    """Write Parquet files with the names that `load_dataset` expects: all of them or none."""
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
