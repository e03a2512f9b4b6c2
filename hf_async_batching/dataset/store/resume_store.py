"""A run's folder: finished rows are written to it as they come, and a later run continues from them.

::

    manifest.json              what the run is made from; names the shards at the end
    data/part-000000.parquet   rows 0 to shard_rows - 1, input and output columns: written once, when all are finished
    work/part-000003.journal   finished rows of a shard that is not finished
    work/inputs-0.log          checksums of the rows that were read
    work/shards-0.log          checksums of the files that were written

The rows of a shard, and all its contents, depend only on the dataset's rows. A run that was killed and continued ends
with the same bytes as a run that was not.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import logging
import queue
import re
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from hf_async_batching.dataset.rows.output_columns import OutputColumns
from hf_async_batching.dataset.rows.row import RowBlock, RowResult
from hf_async_batching.dataset.store.atomic_files import make_folder
from hf_async_batching.dataset.store.fingerprint import Fingerprint
from hf_async_batching.dataset.store.input_log import InputLog
from hf_async_batching.dataset.store.journal import read_journal
from hf_async_batching.dataset.store.manifest import Manifest, check_same, read_manifest
from hf_async_batching.dataset.store.ranks import RankLock, Ranks, is_alive
from hf_async_batching.dataset.store.shard import Shard
from hf_async_batching.dataset.store.shard_files import ShardFile, ShardFiles
from hf_async_batching.errors import HfAsyncBatchingError

logger = logging.getLogger(__name__)

SYNC_SECONDS = 1.0
"""The time of a run that a crash of the machine may lose. A crash of a process loses no finished row."""

SYNC_BYTES = 8 << 20

DEAD_SECONDS = 120.0
"""How long the other ranks wait for a rank that is gone and whose shards are missing."""

_QUEUED = 1024
_WAIT_SECONDS, _MOST_WAIT_SECONDS = 0.1, 1.0
_SHARDS_PER_RANK = 16
_MOST_SHARD_ROWS = 1000
_DRAFT = re.compile(r"\.part-(\d{6,})\..*\.tmp")
_JOURNAL = re.compile(r"part-(\d{6,})\.journal")


class _Inputs(NamedTuple):
    chunk: RowBlock


class _End(NamedTuple):
    num_rows: int


class ResumeStore:
    """Keeps a run's rows in a folder. One thread writes; callers wait only if it falls behind.

    Args:
        folder: The folder; made if it does not exist.
        fingerprint: Fingerprint of the run.
        features: Features of the input and output columns together (`datasets.Features`).
        columns: Columns that the run adds.
        num_rows: Number of rows; None for streams.
        shard_rows: Rows per shard. If the folder has a manifest, the manifest's number is used.
        ranks: This process's rank among the processes that share the run.

    Attributes:
        folder: The argument.
        manifest: What the folder says of itself.
        resumed: Whether the folder was that of an earlier run, or of another process's run.

    Raises:
        ResumeMismatchError: The folder belongs to another run, or another process works in it.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Fingerprint,
        features: Any,
        columns: OutputColumns,
        *,
        num_rows: int | None,
        shard_rows: int | None,
        ranks: Ranks,
    ) -> None:
        self.folder = folder
        self._data, self._work = folder / "data", folder / "work"
        make_folder(folder)
        wanted = Manifest(
            fingerprint=fingerprint,
            shard_rows=shard_rows or _shard_rows(num_rows, ranks.size),
            features=features.to_dict(),
            num_rows=num_rows,
            signed=True,
            made_with={name: importlib.metadata.version(name) for name in ("torch", "transformers", "pyarrow")},
        )
        manifest = read_manifest(folder)
        self.resumed = manifest is not None
        if manifest is None:
            others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
            if others and read_manifest(folder) is None:
                raise ValueError(f"`resume_dir`: {folder} holds other files and no manifest; choose an empty folder")
            wanted.write_if_first(folder)
            manifest = read_manifest(folder)
            assert manifest is not None
        check_same(folder, manifest, wanted)
        if shard_rows is not None and shard_rows != manifest.shard_rows:
            raise ValueError(f"`shard_rows` is {manifest.shard_rows} in {folder}; pass the same number, or None")
        self.manifest = manifest
        make_folder(self._data)
        make_folder(self._work)
        self._ranks = ranks
        self._schema = features.arrow_schema
        self._columns = columns
        self._shard_rows = manifest.shard_rows
        self._shards: dict[int, Shard] = {}
        self._orders: queue.Queue[_Inputs | _End | RowResult | None] = queue.Queue(_QUEUED)
        self._error: BaseException | None = None
        self._lock = RankLock(self._work, ranks.rank)
        try:
            self._inputs = InputLog(self._work, ranks.rank)
            self._files = self._shard_files()
            self._remove_drafts()
        except BaseException:
            self._lock.release()
            raise
        self._writer = threading.Thread(target=self._write, name="hf_async_batching-write", daemon=True)
        self._writer.start()

    # -- the reader's thread --------------------------------------------------------------------------------------

    def read(self, chunk: RowBlock) -> list[int]:
        """Record rows that were read. Returns the indices of the rows that this process must serve.

        Raises:
            ResumeMismatchError: The rows differ from those of an earlier run.
            OSError: The folder cannot be written.
        """
        self._inputs.check(chunk)
        wanted: list[int] = []
        for number, first, last in self._pieces(chunk):
            if self._ranks.owns(number) and not self._files.whole(number):
                done = self._shard(number).done
                wanted += [index for index in range(first, last) if index not in done]
        self._put(_Inputs(chunk))
        return wanted

    def read_all(self, num_rows: int) -> None:
        """Record that all rows have been read.

        Raises:
            ResumeMismatchError: An earlier run has read more or fewer rows.
        """
        self._inputs.end(num_rows)
        self._put(_End(num_rows))

    # -- the caller's thread --------------------------------------------------------------------------------------

    def add(self, result: RowResult) -> None:
        """Keep a finished row.

        Raises:
            OSError: The folder cannot be written; the message says what is kept and how to continue.
        """
        self._put(result)

    def finish(self) -> list[ShardFile]:
        """Wait until this process and all others have written their shards. Returns all shards, in order.

        Raises:
            OSError: The folder cannot be written.
            HfAsyncBatchingError: Another process has died.
        """
        self._stop_writer()
        num_rows = self._inputs.num_rows
        assert num_rows is not None
        self._files.num_rows = num_rows
        count = -(-num_rows // self._shard_rows)
        seen_alive: dict[int, float] = {}
        pause = _WAIT_SECONDS
        while missing := self._missing(count):
            now = time.monotonic()
            self._lock.touch()
            owners = sorted({number % self._ranks.size for number in missing})
            for rank in owners:
                if rank != self._ranks.rank and is_alive(self._work, rank):
                    seen_alive[rank] = now
            dead = [rank for rank in owners if now - seen_alive.setdefault(rank, now) > DEAD_SECONDS]
            if dead:
                raise HfAsyncBatchingError(
                    f"{len(missing)} of {count} shards in {self.folder} are missing, and there is no process "
                    f"of rank {', '.join(map(str, dead))}; start again with the same arguments to continue"
                )
            time.sleep(pause)
            pause = min(1.1 * pause, _MOST_WAIT_SECONDS)  # a shared disk is read less and less often
        self._files.name_strays()
        files = self._files.files(count)
        if self._ranks.rank == 0:
            self.manifest.shards, self.manifest.num_rows = [file.path.name for file in files], num_rows
            self.manifest.checksums = {file.path.name: file.checksum for file in files}
            self.manifest.write(self.folder)
        self._close()
        return files

    def abort(self, left: list[RowResult]) -> int:
        """Write all finished rows, with those in `left`, and stop. Returns how many rows are kept."""
        try:
            for result in left:
                self._put(result)
            self._stop_writer()
        except Exception as error:  # the caller gets the error that ended the run; this one is only logged
            logger.warning("not all finished rows could be written: %s", error)
        for shard in list(self._shards.values()):
            with contextlib.suppress(OSError):
                shard.close()
        self._close()
        return self.rows_kept

    @property
    def rows_kept(self) -> int:
        """Number of finished rows in the folder: those of this process's shards, and those of all complete shards."""
        return self._files.rows_present() + sum(len(shard.done) for shard in list(self._shards.values()))

    def rows_found(self) -> int:
        """Count the finished rows of all processes in the folder; before any row is read."""
        journals = [path for path in self._work.iterdir() if _JOURNAL.fullmatch(path.name)]
        indices = {record["index"] for path in journals for record in read_journal(path)}
        # A damaged file of this process does not count: its rows are computed again.
        files = {
            number for number in self._files.present() if self._files.whole(number) or not self._ranks.owns(number)
        }
        return self._files.rows_present() + sum(index // self._shard_rows not in files for index in indices)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _pieces(self, chunk: RowBlock) -> list[tuple[int, int, int]]:
        """Cut a chunk at the borders of shards; return each piece as shard number, first row and end."""
        pieces, start, end = [], chunk.start, chunk.start + chunk.table.num_rows
        while start < end:
            number = start // self._shard_rows
            stop = min(end, (number + 1) * self._shard_rows)
            pieces.append((number, start, stop))
            start = stop
        return pieces

    def _shard(self, number: int) -> Shard:
        shard = self._shards.get(number)
        if shard is None:
            rows = range(number * self._shard_rows, (number + 1) * self._shard_rows)
            shard = self._shards[number] = Shard(number, rows, self._work, self._columns)
        return shard

    def _put(self, order: _Inputs | _End | RowResult) -> None:
        if self._error is not None:
            raise self._error
        self._orders.put(order)

    def _write(self) -> None:
        last_sync = time.monotonic()
        stopping = False
        while not stopping:
            orders = self._take_orders()
            self._lock.touch()
            stopping = orders[-1] is None
            if self._error is None:
                try:
                    self._carry_out([order for order in orders if order is not None])
                    dirty = sum(shard.unsynced for shard in list(self._shards.values()))
                    if stopping or dirty >= SYNC_BYTES or (dirty and time.monotonic() - last_sync >= SYNC_SECONDS):
                        self._sync()
                        last_sync = time.monotonic()
                except BaseException as error:
                    self._error = self._explained(error)

    def _take_orders(self) -> list[_Inputs | _End | RowResult | None]:
        try:
            orders = [self._orders.get(timeout=SYNC_SECONDS)]
        except queue.Empty:
            return [_Inputs(RowBlock(0, (), None))]
        while orders[-1] is not None:
            try:
                orders.append(self._orders.get_nowait())
            except queue.Empty:
                break
        return orders

    def _carry_out(self, orders: list[_Inputs | _End | RowResult]) -> None:
        results: defaultdict[int, list[RowResult]] = defaultdict(list)
        touched: set[int] = set()
        for order in orders:
            if isinstance(order, RowResult):
                results[order.index // self._shard_rows].append(order)
            elif isinstance(order, _Inputs):
                touched |= self._put_inputs(order.chunk)
            else:
                touched |= self._put_end(order.num_rows)
        for number, finished in results.items():
            self._shard(number).add(finished)
        for number in touched | results.keys():
            shard = self._shards[number]
            if shard.complete:
                said = {**(self._schema.metadata or {}), **self._files.metadata(number)}
                shard.write(self._files.path(number), self._schema.with_metadata(said))
                self._files.written(number)
                del self._shards[number]

    def _put_inputs(self, chunk: RowBlock) -> set[int]:
        touched = set()
        for number, start, stop in self._pieces(chunk) if chunk.table is not None else ():
            if self._ranks.owns(number) and not self._files.whole(number):
                shard = self._shard(number)
                shard.put_inputs(start, chunk.table.slice(start - chunk.start, stop - start))
                if stop == (number + 1) * self._shard_rows:
                    shard.num_rows = self._shard_rows
                touched.add(number)
        return touched

    def _put_end(self, num_rows: int) -> set[int]:
        number, rest = divmod(num_rows, self._shard_rows)
        if rest and number in self._shards:
            self._shards[number].num_rows = rest
            return {number}
        return set()

    def _sync(self) -> None:
        self._inputs.sync()
        self._files.sync()
        for shard in list(self._shards.values()):
            shard.sync()

    def _explained(self, error: BaseException) -> BaseException:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            explained = OSError(
                error.errno,
                f"the disk of `resume_dir` is full ({error.strerror}); rows written before are kept: free some space "
                "and start again with the same arguments to continue",
                str(self.folder),
            )
            explained.__cause__ = error
            return explained
        return error

    def _stop_writer(self) -> None:
        if self._writer.is_alive():
            self._orders.put(None)
            self._writer.join()
        if self._error is not None:
            raise self._error

    def _close(self) -> None:
        self._inputs.close()
        self._files.close()
        self._lock.release()

    def _remove_drafts(self) -> None:
        """Remove unfinished files of a killed process, and journals of written shards."""
        for folder in (self._data, self._work):
            for path in folder.iterdir():
                draft = _DRAFT.fullmatch(path.name)
                if draft and self._ranks.owns(int(draft[1])):
                    path.unlink(missing_ok=True)
        for path in self._work.iterdir():
            journal = _JOURNAL.fullmatch(path.name)
            if journal and self._files.whole(int(journal[1])):
                path.unlink(missing_ok=True)

    def _shard_files(self) -> ShardFiles:
        files = ShardFiles(
            self._data,
            self._work,
            self._ranks.rank,
            run=self.manifest.run,
            shard_rows=self._shard_rows,
            signed=self.manifest.signed,
            checksums=self.manifest.checksums,
        )
        files.num_rows = self.manifest.num_rows if self.manifest.num_rows is not None else self._inputs.num_rows
        files.look(number for number in files.present() if self._ranks.owns(number))
        return files

    def _missing(self, count: int) -> list[int]:
        self._files.look(range(count))
        return [number for number in range(count) if not self._files.whole(number)]


def _shard_rows(num_rows: int | None, ranks: int) -> int:
    """Choose the rows per shard. Each of several processes gets many shards, so that their shares are about equal."""
    if num_rows is None:
        return _MOST_SHARD_ROWS
    if ranks == 1:
        return max(1, min(_MOST_SHARD_ROWS, num_rows))
    return max(1, min(_MOST_SHARD_ROWS, num_rows // (ranks * _SHARDS_PER_RANK)))
