"""Checksums of the rows that were read, so that a run never continues with other data.

There is one record for each chunk and column. It is written before any row of the chunk is served.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from hf_async_batching.dataset.rows.row import RowBlock
from hf_async_batching.dataset.store.fingerprint import digest
from hf_async_batching.dataset.store.journal import Journal, read_journal
from hf_async_batching.errors import ResumeMismatchError

_LOG = re.compile(r"inputs-\d+\.log")


class InputLog:
    """Compares chunks with those that earlier runs have read, and records new ones.

    Args:
        folder: The folder of all ranks' logs.
        rank: Rank whose log is written.

    Attributes:
        num_rows: Number of all rows, known when a run has read the last one.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._known: dict[int, dict[str, Any]] = {}
        self.num_rows: int | None = None
        for path in sorted(folder.iterdir()):
            for record in read_journal(path) if _LOG.fullmatch(path.name) else ():
                if "end" in record:
                    self.num_rows = record["end"]
                else:
                    self._known[record["start"]] = record
        self._journal = Journal(folder / f"inputs-{rank}.log")

    def check(self, chunk: RowBlock) -> None:
        """Compare a chunk with an earlier run's, or record it.

        Raises:
            ResumeMismatchError: An earlier run has read other data; the message names rows and columns.
        """
        count = chunk.table.num_rows
        record = {
            "start": chunk.start,
            "rows": count,
            "columns": {name: _digest(chunk.table.column(name)) for name in chunk.table.column_names},
        }
        known = self._known.pop(chunk.start, None)
        if known is None:
            if self.num_rows is not None and chunk.start >= self.num_rows:
                raise ResumeMismatchError(f"the data has more rows than before: {self.num_rows} then")
            self._journal.append([record])
            return
        columns, before = record["columns"], known["columns"]
        assert isinstance(columns, dict)
        changed = [name for name in dict.fromkeys((*before, *columns)) if before.get(name) != columns.get(name)]
        if known["rows"] != count:
            raise ResumeMismatchError(
                f"the data has another number of rows than before: from row {chunk.start} on {known['rows']} then, "
                f"{count} now"
            )
        if changed:
            raise ResumeMismatchError(
                f"the data has changed: rows {chunk.start} to {chunk.start + count - 1} differ in "
                f"{', '.join(map(repr, changed))}"
            )

    def end(self, num_rows: int) -> None:
        """Record that all rows have been read.

        Raises:
            ResumeMismatchError: An earlier run has read another number of rows.
        """
        if self.num_rows is None:
            self._journal.append([{"end": num_rows}])
            self.num_rows = num_rows
        elif self.num_rows != num_rows:
            raise ResumeMismatchError(f"the data has another number of rows: {self.num_rows} before, {num_rows} now")

    def sync(self) -> None:
        """Write the log through to the disk."""
        self._journal.sync()

    def close(self) -> None:
        """Sync and close."""
        self._journal.close()


def _digest(column: Any) -> str:
    """Return a checksum of a column's Arrow buffers, which are copied first so that equal values have equal bytes."""
    import pyarrow as pa

    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    # `take` copies the values without an offset and without further bytes. The checksum includes the type.
    column = column.take(pa.array(np.arange(len(column))))
    sink = pa.BufferOutputStream()
    schema = pa.schema([pa.field("column", column.type)])
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([column], schema=schema))
    return digest(sink.getvalue().to_pybytes())
