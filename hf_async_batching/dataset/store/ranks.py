"""Several processes on one dataset: the shards of each process, and whether it is alive."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import IO, NamedTuple

import torch

from hf_async_batching.dataset.store.atomic_files import is_not_supported
from hf_async_batching.dataset.store.owner_file import OwnerFile, owner_path, read_owner, take_owner_file
from hf_async_batching.errors import ResumeMismatchError

_TRIES = 20
_TRY_SECONDS = 0.05


class Ranks(NamedTuple):
    """This process's rank among the processes that share the work."""

    rank: int = 0
    size: int = 1

    def owns(self, shard: int) -> bool:
        """Whether this process serves the rows of a shard."""
        return shard % self.size == self.rank


def find_ranks(rank: int | None, world_size: int | None) -> Ranks:
    """Return this process's rank: as given, or from `torch.distributed`, `accelerate launch` or `torchrun`.

    Raises:
        ValueError: Only one of the two is given, or the rank is out of range.
    """
    if (rank is None) != (world_size is None):
        raise ValueError("pass both `rank` and `world_size`, or neither of them")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` ({rank}) must be from 0 to `world_size` - 1 ({world_size - 1})")
    return Ranks(rank, world_size)


class RankLock:
    """A lock that a process holds while it works on its share of a folder.

    The operating system releases the lock if the process dies. On a file system without locks (`flock`), a file names
    the process that holds the lock. The file counts while that process lives; on another machine, while it is touched.

    Args:
        folder: The folder of the locks.
        rank: This process's rank.

    Raises:
        ResumeMismatchError: Another process holds the lock.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        path = _path(folder, rank)
        self._held = _try_lock(path)
        for _ in range(_TRIES):  # another rank may just be checking whether this one is alive
            if self._held is not None:
                break
            time.sleep(_TRY_SECONDS)
            self._held = _try_lock(path)
        if self._held is None:
            owner, named = read_owner(path), owner_path(path)
            raise ResumeMismatchError(
                f"`resume_dir`: another process{f' ({owner})' if owner else ''} works in {folder.parent} as rank "
                f"{rank}; wait until it ends, or choose another folder"
                + (f"; if it has ended, delete {named}" if named.exists() else "")
            )

    def touch(self) -> None:
        """Show other machines that this process is alive."""
        if isinstance(self._held, OwnerFile):
            self._held.touch()

    def release(self) -> None:
        """Let it go."""
        if self._held is not None:
            self._held.close()
            self._held = None


def is_alive(folder: Path, rank: int) -> bool:
    """Whether a process with this rank works in the folder now."""
    held = _try_lock(_path(folder, rank))
    if held is None:
        return True
    held.close()
    return False


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.lock"


def _try_lock(path: Path) -> IO[bytes] | OwnerFile | None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return take_owner_file(path)
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        file.close()
        if not is_not_supported(error):
            raise
        return take_owner_file(path)
    return file
