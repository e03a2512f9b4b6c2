"""A range of rows that becomes one Parquet file, with the rows that were read and the rows that are finished."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_async_batching.dataset.rows.output_columns import OutputColumns
from hf_async_batching.dataset.rows.row import Completion, RowResult
from hf_async_batching.dataset.store.atomic_files import write_whole
from hf_async_batching.dataset.store.journal import Journal, read_journal
from hf_async_batching.dataset.store.shard_files import shard_name


class Shard:
    """A shard that is not written yet. Finished rows go to a journal; at the end, all rows go to a file.

    Args:
        number: Number of the shard.
        rows: Indices of the shard's rows; the last shard may have fewer.
        work: The folder of the journals.
        columns: Columns that the run adds.

    Attributes:
        done: Results by row.
        num_rows: Length of the shard; None until it is known.
    """

    def __init__(self, number: int, rows: range, work: Path, columns: OutputColumns) -> None:
        self.number = number
        self.num_rows: int | None = None
        self._first = rows.start
        self._columns = columns
        self._inputs: dict[int, Any] = {}
        self._journal_path = work / f"{Path(shard_name(number)).stem}.journal"
        self._journal: Journal | None = None
        self.done: dict[int, RowResult] = {}
        for record in read_journal(self._journal_path):
            # Records of other rows are ignored, so that a journal under another shard's name does no harm.
            if record["index"] in rows:
                self.done[record["index"]] = _result(record)

    def put_inputs(self, start: int, table: Any) -> None:
        """Add rows as they were read, from row `start` on, with all columns."""
        self._inputs[start] = table

    def add(self, results: list[RowResult]) -> None:
        """Add finished rows, and write them to the journal.

        Raises:
            OSError: The rows could not be written.
        """
        if self._journal is None:
            self._journal = Journal(self._journal_path)
        self._journal.append([_record(result) for result in results])
        self.done.update((result.index, result) for result in results)

    @property
    def unsynced(self) -> int:
        """Number of bytes that a crash of the machine would lose."""
        return self._journal.unsynced if self._journal is not None else 0

    def sync(self) -> None:
        """Write the finished rows through to the disk."""
        if self._journal is not None:
            self._journal.sync()

    @property
    def complete(self) -> bool:
        """Whether all rows are finished."""
        return self.num_rows is not None and len(self.done) == self.num_rows

    def write(self, path: Path, schema: Any) -> None:
        """Write the shard's file, and remove the journal.

        Raises:
            OSError: The file could not be written; the journal still exists.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        assert self.num_rows is not None
        inputs = pa.concat_tables([self._inputs[start] for start in sorted(self._inputs)])
        added = self._columns.arrays([self.done[self._first + i] for i in range(self.num_rows)])
        arrays = {name: inputs.column(name) for name in inputs.column_names} | added
        # The rows are written in one piece, so that the file does not depend on the chunks in which they were read.
        table = pa.table([arrays[name] for name in schema.names], schema=schema).combine_chunks()
        write_whole(path, lambda draft: pq.write_table(table, draft))
        self.forget()

    def forget(self) -> None:
        """Remove the journal."""
        if self._journal is not None:
            self._journal.close()
        self._journal_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Write the journal through to the disk and close it."""
        if self._journal is not None:
            self._journal.close()


def _record(result: RowResult) -> dict[str, Any]:
    return asdict(result)


def _result(record: dict[str, Any]) -> RowResult:
    completions = [Completion(**completion) for completion in record.pop("completions")]
    return RowResult(completions=completions, **record)
