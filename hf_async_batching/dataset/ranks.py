"""Several processes on one dataset: which shards are whose, and who is still alive."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import IO, NamedTuple

import torch

from hf_async_batching.errors import ResumeMismatchError

_TRIES = 20
_TRY_SECONDS = 0.05


class Ranks(NamedTuple):
    """This process among those that share the work."""

    rank: int = 0
    size: int = 1

    def owns(self, shard: int) -> bool:
        """Whether the rows of a shard are this process's."""
        return shard % self.size == self.rank


def find_ranks(rank: int | None, world_size: int | None) -> Ranks:
    """This process's rank: as given, or as `torch.distributed`, `accelerate launch` or `torchrun` have set it.

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
    """Held by a process for as long as it works on its share of a folder; the system lets it go if the process dies.

    Args:
        folder: Where the locks are.
        rank: This process's.

    Raises:
        ResumeMismatchError: Another process has it.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._file = _try_lock(_path(folder, rank))
        for _ in range(_TRIES):  # another rank may be looking whether this one is alive
            if self._file is not None:
                break
            time.sleep(_TRY_SECONDS)
            self._file = _try_lock(_path(folder, rank))
        if self._file is None:
            raise ResumeMismatchError(
                f"`resume_dir`: another process works in {folder.parent} as rank {rank}; wait for its end, or choose "
                "another folder"
            )

    def release(self) -> None:
        """Let it go."""
        if self._file is not None:
            self._file.close()
            self._file = None


def is_alive(folder: Path, rank: int) -> bool:
    """Whether a process with this rank works in the folder now."""
    file = _try_lock(_path(folder, rank))
    if file is None:
        return True
    file.close()
    return False


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.lock"


def _try_lock(path: Path) -> IO[bytes] | None:
    file = path.open("ab")
    try:
        import fcntl
    except ImportError:  # not a POSIX system: nobody is locked out
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
