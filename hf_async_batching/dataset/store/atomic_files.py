"""Files that are there in full or not at all, also after the power went."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

# What file systems answer that cannot do a thing at all: exFAT, FUSE, SMB, ...
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.ENOLCK}


def is_not_supported(error: OSError) -> bool:
    """Whether a file system has refused a kind of call rather than this one."""
    return error.errno in _NOT_SUPPORTED


def sync_file(descriptor: int) -> None:
    """Bring a file to the disk, where its file system can.

    Raises:
        OSError: It could not be written.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_not_supported(error):
            raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a crash of the machine, where its file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # folders cannot be opened everywhere
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_not_supported(error) and error.errno != errno.EBADF:
            raise
    finally:
        os.close(descriptor)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, bring it to the disk, and give it its name in one step.

    Raises:
        OSError: It could not be written; nothing of it is left.
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
    """Write a file in full, unless another process has done so, whose content stays.

    A file system without hard links cannot tell which of two processes was first: there the last one's content stays.

    Raises:
        OSError: It could not be written.
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
    """Make a folder and its parents, and bring their names to the disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
