"""Files that are there in full or not at all, also after the power went."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
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
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, and bring their names to the disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
