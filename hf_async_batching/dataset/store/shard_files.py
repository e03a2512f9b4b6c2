"""The shards' files of a run's folder, with a check that a file is intact and was written by this run.

A file's name proves nothing: a copy, a file of another run, or half a file can have it. Each file's metadata name its
run and its shard, and the run keeps a checksum of each file that it has written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hf_async_batching.dataset.store.journal import Journal, read_journal

logger = logging.getLogger(__name__)

_NAME = re.compile(r"part-(\d{6,})\.parquet")
_LOG = re.compile(r"shards-\d+\.log")
_METADATA = b"hf_async_batching"


def shard_name(number: int) -> str:
    """Return the name of a shard's file; names sort in the order of the shards."""
    return f"part-{number:06d}.parquet"


def shard_number(name: str) -> int | None:
    """Return the number of the shard with this file name; None for any other file."""
    match = _NAME.fullmatch(name)
    number = int(match[1]) if match else None
    return number if number is not None and shard_name(number) == name else None


class ShardFile(NamedTuple):
    """An intact file.

    Attributes:
        path: Path of the file.
        checksum: Checksum of its content.
    """

    path: Path
    checksum: str


class ShardFiles:
    """Tracks the written shards.

    Args:
        data: The folder of the shards.
        work: The folder of the logs.
        rank: Rank whose log is written.
        run: Checksum that distinguishes this run from others.
        shard_rows: Rows per shard; the last shard has the rest.
        signed: Whether each file names its run and its shard. Files of earlier versions do not.
        checksums: Checksums of a finished run's files, by name.

    Attributes:
        num_rows: Length of the whole dataset; None if unknown.
    """

    def __init__(
        self,
        data: Path,
        work: Path,
        rank: int,
        *,
        run: str,
        shard_rows: int,
        signed: bool = True,
        checksums: dict[str, str] | None = None,
    ) -> None:
        self._data, self._work, self._run, self._shard_rows, self._signed = data, work, run, shard_rows, signed
        self._checksums = checksums or {}
        self._whole: dict[int, ShardFile] = {}
        self._seen: dict[int, tuple[int, int]] = {}
        self.num_rows: int | None = None
        self._journal = Journal(work / f"shards-{rank}.log")
        self._logged: dict[int, set[str]] = {}

    def metadata(self, number: int) -> dict[bytes, bytes]:
        """Return the metadata for a shard's schema."""
        return {_METADATA: json.dumps({"run": self._run, "shard": number}).encode()}

    def path(self, number: int) -> Path:
        """Return the path of a shard's file."""
        return self._data / shard_name(number)

    def written(self, number: int) -> None:
        """Record a file that this process has just written."""
        checksum = _checksum(self.path(number))
        self._whole[number] = ShardFile(self.path(number), checksum)
        self._journal.append([{"shard": number, "checksum": checksum}])

    def look(self, numbers: Iterable[int]) -> None:
        """Read shards' files if they exist; a warning names the damaged ones."""
        self._read_logs()
        for number in numbers:
            if number not in self._whole:
                self._look_at(number)

    def whole(self, number: int) -> bool:
        """Whether a shard's file was found to be intact."""
        return number in self._whole

    def files(self, count: int) -> list[ShardFile]:
        """Return the files of the first `count` shards, which must all be intact."""
        return [self._whole[number] for number in range(count)]

    def present(self) -> Iterator[int]:
        """Yield the shards that have a file, intact or not."""
        return (number for path in self._data.iterdir() if (number := self._number(path)) is not None)

    def name_strays(self) -> None:
        """Warn about files that are not shards of this run; they are not read."""
        files = (path for path in self._data.iterdir() if not path.name.startswith("."))
        names = sorted(path.name for path in files if self._number(path) is None)
        if names:
            logger.warning(
                "%s: %s: not shards of this run, ignored here; remove them before other programs read the folder",
                self._data,
                ", ".join(names),
            )

    def rows_present(self) -> int:
        """Number of rows in existing shards of all processes, without shards that are known to be damaged."""
        import pyarrow.parquet as pq

        rows = sum(self._rows(number) for number in self._whole)
        for number in self.present():
            if number not in self._whole and number not in self._seen:
                with contextlib.suppress(Exception):
                    rows += pq.read_metadata(self.path(number)).num_rows
        return rows

    def sync(self) -> None:
        """Write the log through to the disk."""
        self._journal.sync()

    def close(self) -> None:
        """Sync and close."""
        self._journal.close()

    def _number(self, path: Path) -> int | None:
        number = shard_number(path.name)
        beyond = number is not None and self.num_rows is not None and number * self._shard_rows >= self.num_rows
        return None if beyond else number

    def _rows(self, number: int) -> int:
        rest = self._shard_rows if self.num_rows is None else self.num_rows - number * self._shard_rows
        return min(self._shard_rows, rest)

    def _read_logs(self) -> None:
        logged: defaultdict[int, set[str]] = defaultdict(set)
        for name, checksum in self._checksums.items():
            number = shard_number(name)
            if number is not None:
                logged[number].add(checksum)
        for path in self._work.iterdir():
            for record in read_journal(path) if _LOG.fullmatch(path.name) else ():
                logged[record["shard"]].add(record["checksum"])
        self._logged = dict(logged)

    def _look_at(self, number: int) -> None:
        path = self.path(number)
        try:
            status = path.stat()
            state = status.st_mtime_ns, status.st_size
            if self._seen.get(number) == state:  # damaged, as before
                return
            self._seen[number] = state
            checksum = _checksum(path)
            problem = self._problem(number, path, checksum)
        except FileNotFoundError:
            return
        except Exception as error:  # pyarrow raises many kinds
            problem = str(error)
        if problem is None:
            self._whole[number] = ShardFile(path, checksum)
        else:
            logger.warning("%s is damaged (%s); its rows are computed again", path, problem)

    def _problem(self, number: int, path: Path, checksum: str) -> str | None:
        import pyarrow.parquet as pq

        metadata = pq.read_metadata(path)
        if metadata.num_rows != self._rows(number):
            return f"it has {metadata.num_rows} rows, not {self._rows(number)}"
        said = (pq.read_schema(path).metadata or {}).get(_METADATA)
        if said is not None and said != self.metadata(number)[_METADATA]:
            return "it is another shard, or another run's"
        known = self._logged.get(number)
        if known is None:
            # The process that wrote the file was killed before it recorded the checksum.
            return None if said is not None or not self._signed else "it was not written by this run"
        return None if checksum in known else "its content has changed"


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=12)).hexdigest()


def load_files(files: list[ShardFile], features: Any, *, streaming: bool) -> Any:
    """Load the rows of shards, in order.

    Args:
        files: Files of the shards, at least one.
        features: Features of the rows (`datasets.Features`).
        streaming: Whether to return an `IterableDataset`.
    """
    from datasets import Dataset, IterableDataset
    from datasets.data_files import DataFilesDict, DataFilesList

    # `datasets` would read a list of names as patterns. It caches these files by their contents.
    listed = DataFilesList([str(file.path.absolute()) for file in files], [(file.checksum,) for file in files])
    found = DataFilesDict({"train": listed})
    loaded: Any = (IterableDataset if streaming else Dataset).from_parquet(found, split="train", features=features)
    return loaded
