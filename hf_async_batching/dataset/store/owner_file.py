"""A lock for file systems without locks: a file that names the process that holds it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

TOUCHED_SECONDS = 120.0
"""How long an owner file of another machine counts after it was last touched."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that holds a lock.

    Attributes:
        host: The machine of the process.
        process: The process's id on that machine.
        started: The process's start time in seconds, because ids are reused.
        path: The file that names the process.
    """

    host: str
    process: int
    started: float
    path: Path

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    def lives(self) -> bool:
        """Whether the process still runs; on another machine, whether it has touched its file recently."""
        if self.host == socket.gethostname():
            try:
                return abs(psutil.Process(self.process).create_time() - self.started) < 1
            except psutil.NoSuchProcess:
                return False
            except psutil.AccessDenied:
                return True
        try:
            return _now(self.path) - self.path.stat().st_mtime < TOUCHED_SECONDS
        except FileNotFoundError:
            return False


class OwnerFile:
    """A lock that this process holds.

    Args:
        path: The file, which names this process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def touch(self) -> None:
        """Show that this process is alive."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def close(self) -> None:
        """Let it go."""
        self.path.unlink(missing_ok=True)


def take_owner_file(lock: Path) -> OwnerFile | None:
    """Take a lock; None if a live process holds it.

    Args:
        lock: The file that would be locked; the file that names its owner is beside it.

    Raises:
        OSError: The file cannot be written.
    """
    path = owner_path(lock)
    owner = read_owner(lock)
    if owner is not None:
        if owner.lives():
            return None
        path.unlink(missing_ok=True)
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        return None
    with file:
        me = Owner(socket.gethostname(), os.getpid(), psutil.Process().create_time(), path)
        json.dump(asdict(me) | {"path": path.name}, file)
    return OwnerFile(path)


def read_owner(lock: Path) -> Owner | None:
    """Return the process that holds a lock; None if no process does, or if its file is not complete yet."""
    path = owner_path(lock)
    try:
        return Owner(**{**json.loads(path.read_text(encoding="utf-8")), "path": path})
    except (OSError, ValueError, TypeError):
        return None


def owner_path(lock: Path) -> Path:
    """Return the path of the file that names the owner of a lock."""
    return lock.with_suffix(".owner")


def _now(beside: Path) -> float:
    """Return the time of the file system's clock."""
    probe = beside.with_name(f".{beside.name}.{os.getpid()}.tmp")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
