"""Reads a visitor's table in a separate process, within bounds: `python table_reader.py FILE < BOUNDS > ROWS`.

A small file can hold a table that fills the memory (a dictionary of one long text, a page that is compressed a
thousandfold, a billion nulls in one list). So the process reads a few rows at a time and measures dictionaries before
it expands them. If it still takes too much, the operating system ends it. Bounds come as JSON. Rows go out as an Arrow
stream, whose schema says under `more` whether the file has more. The process imports pyarrow and nothing of the page,
so it starts in a fraction of a second.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

_BATCH_ROWS = 16
_TEXTS = (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string, pa.types.is_large_binary)
# The exit status if the file is at fault. The text on stderr is then for the visitor.
REFUSED = 3


class RefusedError(ValueError):
    """The file exceeds a bound or is broken; the message is for the visitor."""


class TableBounds(NamedTuple):
    """Bounds on rows, columns, bytes of a cell and bytes of all, and on the process's memory and time."""

    rows: int
    columns: int
    cell_bytes: int
    table_bytes: int
    memory_bytes: int
    seconds: int


def limit_process(bounds: TableBounds) -> None:
    """Let the operating system end this process if it takes more memory or time than allowed."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    resource.setrlimit(resource.RLIMIT_AS, (bounds.memory_bytes, bounds.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (bounds.seconds, bounds.seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def read(path: Path, bounds: TableBounds) -> tuple[pa.Table, bool]:
    """Return the first rows of a file, and whether it has more.

    Raises:
        RefusedError: The file has no rows, or exceeds a bound.
    """
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, bounds)
    reader = _csv if path.suffix.lower() == ".csv" else _jsonl
    rows = list(itertools.islice(reader(path, bounds), bounds.rows + 1))
    if not rows:
        raise RefusedError(f"{path.name} has no rows.")
    return pa.Table.from_pylist(rows[: bounds.rows]), len(rows) > bounds.rows


def _csv(path: Path, bounds: TableBounds) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(bounds.cell_bytes)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        _check_columns(path, len(reader.fieldnames or ()), bounds)
        for row in reader:
            if None in row:
                raise RefusedError(f"{path.name}, line {reader.line_num}: more cells than there are column names.")
            yield row


def _jsonl(path: Path, bounds: TableBounds) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if len(line) > bounds.columns * bounds.cell_bytes:
                raise RefusedError(f"{path.name}, line {number} is too long.")
            row = json.loads(line)
            if not isinstance(row, dict):
                raise RefusedError(f"{path.name}, line {number}: one JSON object per line is needed.")
            _check_columns(path, len(row), bounds)
            for name, value in row.items():
                if isinstance(value, str) and len(value) > bounds.cell_bytes:
                    raise _too_long(path, name, bounds)
            yield row


def _read_parquet(path: Path, bounds: TableBounds) -> tuple[pa.Table, bool]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as looked:
        schema = looked.schema
        leaves = [schema.column(number) for number in range(len(schema))]
        _check_columns(path, len(leaves), bounds)
        for leaf in leaves:
            if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" and leaf.length > bounds.cell_bytes:
                raise _too_long(path, leaf.path, bounds)
        # Repeated texts stay dictionaries until they are measured. Texts inside lists and structs are expanded at
        # once: a batch is small, and this process has little memory.
        names = frozenset(schema.to_arrow_schema().names)
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.path in names]
    batches: list[pa.RecordBatch] = []
    rows = taken = 0
    with ParquetFile(path, read_dictionary=texts) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
            taken += sum(_size(path, name, column, bounds) for name, column in zip(batch.schema.names, batch.columns))
            if taken > bounds.table_bytes:
                raise RefusedError(
                    f"The first {rows + len(batch):,} rows of {path.name} hold {taken >> 20} MB; a table may hold "
                    f"{bounds.table_bytes >> 20} MB."
                )
            columns = [_plain(column) for column in batch.columns]
            batches.append(pa.record_batch(columns, names=batch.schema.names))
            rows += len(batch)
            if rows > bounds.rows:
                break
    if not rows:
        raise RefusedError(f"{path.name} has no rows.")
    return pa.Table.from_batches(batches).slice(0, bounds.rows), rows > bounds.rows


def _size(path: Path, name: str, column: pa.Array, bounds: TableBounds) -> int:
    """Return the bytes of a column when it is expanded."""
    values = column.dictionary if pa.types.is_dictionary(column.type) else column
    kind = values.type
    if not any(is_text(kind) for is_text in _TEXTS):
        if column.nbytes > bounds.cell_bytes * len(column):
            raise _too_long(path, name, bounds)
        return int(column.nbytes)
    lengths = pc.binary_length(values)
    if values is not column:
        lengths = lengths.take(column.indices)
    if (pc.max(lengths).as_py() or 0) > bounds.cell_bytes:
        raise _too_long(path, name, bounds)
    return int(pc.sum(lengths).as_py() or 0)


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _check_columns(path: Path, count: int, bounds: TableBounds) -> None:
    if count > bounds.columns:
        raise RefusedError(f"{path.name} has more than {bounds.columns} columns.")


def _too_long(path: Path, name: str, bounds: TableBounds) -> RefusedError:
    return RefusedError(
        f"A cell of column {name[:60]!r} of {path.name} is longer than {bounds.cell_bytes >> 10} kB: shorten it."
    )


def main() -> int:
    """Write the rows of the file that the command names; return the exit status."""
    path, bounds = Path(sys.argv[1]), TableBounds(**json.load(sys.stdin))
    limit_process(bounds)
    try:
        table, more = read(path, bounds)
        if table.nbytes > bounds.table_bytes:
            raise RefusedError(f"{path.name} holds more than {bounds.table_bytes >> 20} MB.")
        table = table.replace_schema_metadata({b"more": b"1" if more else b""})
        with pa.ipc.new_stream(sys.stdout.buffer, table.schema) as stream:
            stream.write_table(table)
    except RefusedError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except MemoryError:
        print(f"{path.name} cannot be read: it takes more memory than a table may.", file=sys.stderr)
        return REFUSED
    except Exception as error:  # csv, json, pyarrow and unicode each have their own
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        print(f"{path.name} cannot be read: {reason}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
