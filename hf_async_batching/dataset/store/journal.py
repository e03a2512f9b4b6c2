"""An append-only file of records. Incomplete records after a crash are recognized and cut off.

A record is its length, the CRC-32 of its content, and the content, which is JSON. Reading stops at the first
incomplete record, because no later record was ever synced before it.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hf_async_batching.dataset.store.atomic_files import sync_file, sync_folder

_MAGIC = b"hfab-journal-1\n\x00"
_HEADER = struct.Struct("<II")


def read_journal(path: Path) -> Iterator[Any]:
    """Yield the complete records of a journal; none if the file does not exist."""
    yield from (record for record, _ in _records(path))


class Journal:
    """Appends records to a file. Everything but complete records is cut off first.

    Args:
        path: The file; made if it does not exist.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        end = 0
        for _, end in _records(path):  # noqa: B007
            pass
        self.path = path
        self._unsynced = 0
        exists = path.exists()
        # The file is unbuffered: `append` writes whole batches, and they survive the process.
        self._file: BinaryIO = path.open("r+b" if exists else "w+b", buffering=0)
        if end:
            self._file.truncate(end)
            self._file.seek(end)
            self._end = end
        else:
            self._file.truncate(0)
            _write(self._file, _MAGIC)
            self._end = len(_MAGIC)
        if not exists:
            sync_file(self._file.fileno())
            sync_folder(path.parent)

    @property
    def unsynced(self) -> int:
        """Number of bytes that a crash of the machine would lose; a crash of the process loses none."""
        return self._unsynced

    def append(self, records: list[Any]) -> None:
        """Write records.

        Raises:
            OSError: The records could not be written; none of them counts.
        """
        batch = bytearray()
        for record in records:
            content = json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode("ascii")
            batch += _HEADER.pack(len(content), zlib.crc32(content)) + content
        try:
            _write(self._file, batch)
        except OSError:
            # An incomplete record would hide the records that a later attempt writes after it.
            self._file.truncate(self._end)
            self._file.seek(self._end)
            raise
        self._end += len(batch)
        self._unsynced += len(batch)

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        if self._unsynced:
            sync_file(self._file.fileno())
            self._unsynced = 0

    def close(self) -> None:
        """Sync and close."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()


def _write(file: BinaryIO, content: bytes | bytearray) -> None:
    rest = memoryview(content)
    while len(rest):
        rest = rest[file.write(rest) :]


def _records(path: Path) -> Iterator[tuple[Any, int]]:
    """Yield the records and the positions of their ends."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        if file.read(len(_MAGIC)) != _MAGIC:
            return
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            length, checksum = _HEADER.unpack(header)
            content = file.read(length)
            if len(content) < length or zlib.crc32(content) != checksum:
                return
            yield json.loads(content), file.tell()
