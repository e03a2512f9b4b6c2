"""Reads the finished rows of a run from its folder while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from datasets import Dataset

from hf_async_batching.dataset.store.journal import read_journal
from hf_async_batching.dataset.store.manifest import read_manifest


class FinishedRow(NamedTuple):
    """A row's completion and the reason for its end, or its error."""

    text: str | None
    finish_reason: str | None
    error: str | None


class FinishedRows:
    """Finished rows by index. `read` adds the new ones from the folder.

    Args:
        folder: The `resume_dir` of the run.
        names: The names of the columns of the run, by `FinishedRow` field.
    """

    def __init__(self, folder: Path, names: dict[str, str]) -> None:
        self._folder = folder
        self._names = names
        self._seen: set[Path] = set()
        self.rows: dict[int, FinishedRow] = {}

    def read(self) -> None:
        """Read the journals of unfinished shards, and the shards that were finished since the last call."""
        manifest = read_manifest(self._folder)
        if manifest is None:
            return
        for journal in self._folder.glob("work/part-*.journal"):
            for record in read_journal(journal):
                text, reason = None, None
                if record["completions"]:
                    text, reason = record["completions"][0]["text"], record["completions"][0]["finish_reason"]
                self.rows[record["index"]] = FinishedRow(text, reason, record["error"])
        columns = [self._names[name] for name in FinishedRow._fields]
        for shard in set(self._folder.glob("data/part-*.parquet")) - self._seen:
            first = int(shard.stem.removeprefix("part-")[:6]) * manifest.shard_rows
            values = pq.read_table(shard, columns=columns).to_pydict()
            for index, row in enumerate(zip(*(values[column] for column in columns), strict=True), first):
                self.rows[index] = FinishedRow(*row)
            self._seen.add(shard)

    def table(self, table: Dataset) -> Dataset:
        """Return the finished rows of a table, with their completions."""
        indices = sorted(self.rows)
        part = table.select(indices)
        for field, name in self._names.items():
            part = part.add_column(name, [getattr(self.rows[index], field) for index in indices])
        return part
