"""Reads visitors' tables (CSV, JSON Lines, Parquet) within bounds, and writes tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from ..serving.assets import asset
from .table_reader import REFUSED, TableBounds

MAX_ROWS = 2000
MAX_BYTES = 20 << 20
# Bounds on a decoded file.
BOUNDS = TableBounds(
    rows=MAX_ROWS, columns=64, cell_bytes=256 << 10, table_bytes=32 << 20, memory_bytes=1 << 30, seconds=20
)
_WAIT_SECONDS = 30.0
_READ = frozenset((".csv", ".jsonl", ".ndjson", ".json", ".parquet"))
BUILT_IN = {"40 short tasks (built in)": "tasks.jsonl"}
FORMATS = ("jsonl", "csv", "parquet")


class TableError(ValueError):
    """A file is refused; the message is for the visitor."""


def built_in(name: str) -> Dataset:
    """Return one of the small datasets that come with the page."""
    return Dataset.from_list([json.loads(line) for line in asset(BUILT_IN[name]).splitlines()])


def read_table(path: Path) -> tuple[Dataset, bool]:
    """Return the first rows of a file, and whether it has more. Blocks while a process starts and reads.

    A separate process (`table_reader.py`) reads the file, and ends if the table takes too much memory or time. The
    size of a file says nothing about the size of its decoded table.

    Raises:
        TableError: The file is too large, of another kind, empty, broken, or decodes to too much.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise TableError(f"The file has {size / 2**20:.0f} MB; up to {MAX_BYTES >> 20} MB are read.")
    if path.suffix.lower() not in _READ:
        raise TableError(f"{path.name}: a CSV, JSONL or Parquet file is needed.")
    command = [sys.executable, "-I", str(Path(__file__).with_name("table_reader.py")), str(path)]
    # An allocator that reserves address space ahead of need would reach the limit at once.
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
    bounds = json.dumps(BOUNDS._asdict()).encode()
    try:
        done = subprocess.run(command, input=bounds, capture_output=True, env=environment, timeout=_WAIT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise TableError(f"{path.name} takes too long to read.") from error
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip() if done.returncode == REFUSED else ""
        raise TableError(told or f"{path.name} cannot be read: it takes more memory or time than a table may.")
    table = pa.ipc.open_stream(done.stdout).read_all()
    more = bool((table.schema.metadata or {}).get(b"more"))
    return Dataset(table.replace_schema_metadata(None)), more


def table_of(rows: Sequence[Any]) -> Dataset:
    """Return a table of rows that a client sent as JSON.

    Raises:
        TableError: The rows are not objects with the same keys, or exceed a bound.
    """
    if not 0 < len(rows) <= MAX_ROWS:
        raise TableError(f"`rows` must be 1 to {MAX_ROWS} objects, got {len(rows)}")
    if not all(isinstance(row, dict) for row in rows):
        raise TableError("`rows` must be objects with the same keys")
    if max(map(len, rows)) > BOUNDS.columns:
        raise TableError(f"`rows` may have up to {BOUNDS.columns} keys each")
    try:
        table = Dataset.from_list(list(rows))
    except Exception as error:  # pyarrow has several of its own
        raise TableError(f"`rows` must be objects with the same keys: {str(error)[:200]}") from error
    if table.data.nbytes > BOUNDS.table_bytes:
        raise TableError(f"`rows` may hold up to {BOUNDS.table_bytes >> 20} MB")
    return table


def text_columns(table: Dataset) -> list[str]:
    """Return the columns that hold text."""
    return [
        name for name, feature in table.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]


def likely_column(table: Dataset) -> str:
    """Return the text column that most looks like prompts, by its name or else by its length."""
    columns, first = text_columns(table), table[:20]
    named = [name for name in ("prompt", "question", "instruction", "messages") if name in columns]
    return named[0] if named else max(columns, key=lambda name: sum(len(text or "") for text in first[name]))


def write_table(table: Dataset, folder: Path, kind: str) -> Path:
    """Write a table in one of `FORMATS`; return the file."""
    path = folder / f"completions.{kind}"
    if kind == "csv":
        table.to_csv(path)
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, force_ascii=False)
    return path
