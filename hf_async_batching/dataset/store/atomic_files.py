"""Writes files that exist in full or not at all, even after a power failure."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

# Errors of file systems that lack an operation: exFAT, FUSE, SMB, ...
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.ENOLCK}


def is_not_supported(error: OSError) -> bool:
    """Whether a file system lacks an operation, rather than failing at this call."""
    return error.errno in _NOT_SUPPORTED


def sync_file(descriptor: int) -> None:
    """Write a file through to the disk, if its file system can do so.

    Raises:
        OSError: The file could not be written.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_not_supported(error):
            raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash of the machine, if its file system can do so."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # some systems cannot open folders
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_not_supported(error) and error.errno != errno.EBADF:
            raise
    finally:
        os.close(descriptor)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, write it through to the disk, and rename it to `path` in one step.

    Raises:
        OSError: The file could not be written; no part of it is left.
    """
    draft = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        write(draft)
        with draft.open("rb+") as file:
            sync_file(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_if_first(path: Path, content: str) -> None:
    """Write a file in full, unless another process has written it first; then that process's content stays.

    A file system without hard links cannot tell which of two processes was first. There, the later content stays.

    Raises:
        OSError: The file could not be written.
    """
    draft = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            sync_file(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
        except OSError as error:
            if not is_not_supported(error):
                raise
            if path.exists():
                return
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, and write their names through to the disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
