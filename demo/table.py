"""Tables that visitors bring: CSV, JSON Lines and Parquet, read with bounds, and written again."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from .page import asset

MAX_ROWS = 2000
MAX_BYTES = 20 << 20
_MAX_COLUMNS = 64
BUILT_IN = {"40 short tasks (built in)": "tasks.jsonl"}
FORMATS = ("jsonl", "csv", "parquet")


class TableError(ValueError):
    """A file cannot be used; the message is for the visitor."""


def built_in(name: str) -> Dataset:
    """One of the small datasets that come with the page."""
    return Dataset.from_list([json.loads(line) for line in asset(BUILT_IN[name]).splitlines()])


def read_table(path: Path) -> tuple[Dataset, bool]:
    """The first rows of a file, and whether there were more.

    Raises:
        TableError: It is too large, of another kind, empty, or broken.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise TableError(f"The file has {size / 2**20:.0f} MB; up to {MAX_BYTES >> 20} MB are read.")
    readers = {".csv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _jsonl, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise TableError(f"{path.name}: a CSV, JSONL or Parquet file is needed.")
    try:
        rows = list(itertools.islice(reader(path), MAX_ROWS + 1))
        if not rows:
            raise TableError(f"{path.name} has no rows.")
        if max(map(len, rows)) > _MAX_COLUMNS:
            raise TableError(f"{path.name} has more than {_MAX_COLUMNS} columns.")
        return Dataset.from_list(rows[:MAX_ROWS]), len(rows) > MAX_ROWS
    except TableError:
        raise
    except Exception as error:  # csv, json, pyarrow and unicode have each their own
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise TableError(f"{path.name} cannot be read: {reason}") from error


def text_columns(table: Dataset) -> list[str]:
    """Columns that hold text."""
    return [
        name for name, feature in table.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]


def likely_column(table: Dataset) -> str:
    """The column of text that most looks like prompts: by its name, or else by its length."""
    columns, first = text_columns(table), table[:20]
    named = [name for name in ("prompt", "question", "instruction", "messages") if name in columns]
    return named[0] if named else max(columns, key=lambda name: sum(len(text or "") for text in first[name]))


def write_table(table: Dataset, folder: Path, kind: str) -> Path:
    """Write a table as one of `FORMATS`; returns the file."""
    path = folder / f"completions.{kind}"
    if kind == "csv":
        table.to_csv(path)
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, force_ascii=False)
    return path


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            if None in row:
                raise TableError(f"{path.name}, line {reader.line_num}: more cells than there are column names.")
            yield row


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TableError(f"{path.name}, line {number}: one JSON object per line is needed.")
            yield row


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()
