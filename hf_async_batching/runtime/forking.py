"""Forked processes: memory works in the child, threads and CUDA do not.

`os.fork` copies locks in their current state, even if the threads that hold them do not exist in the child. A thread
that has computed with several OpenMP threads waits for them forever in the child; a thread that the child starts gets
OpenMP threads of its own.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch

from hf_async_batching.errors import ForkedProcessError

T = TypeVar("T")

_forks = 0
_cuda_in_parent = False
_locks: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()
_renewed: weakref.WeakSet[Any] = weakref.WeakSet()
# Objects that a child must not collect, because freeing device memory fails in it.
_left_behind: list[object] = []


class ForkSafeLock:
    """A reentrant lock that is free in a forked process, unless the thread that forked holds it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Free the lock in a child, in which the thread that held it does not exist."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = threading.RLock()


def forks() -> int:
    """The number of forks between this process and the one that imported this module.

    An object that was made at another number belongs to another process.
    """
    return _forks


def renew_in_child(owner: Any) -> None:
    """Call `owner.renew()` in a child after its locks are freed; `owner` is not kept alive."""
    _renewed.add(owner)


def leave_behind(*parts: object) -> None:
    """Keep objects of the parent alive as long as the child lives, without using them again."""
    _left_behind.extend(parts)


def check_device(device: torch.device) -> None:
    """Refuse to compute on a GPU in a forked process whose parent has used one.

    Raises:
        ForkedProcessError: This is such a process.
    """
    if _forks and _cuda_in_parent and device.type == "cuda":
        raise ForkedProcessError(
            "this process was forked from one that has used CUDA, where CUDA does not work: start worker processes "
            'with the "spawn" start method (multiprocessing.get_context("spawn"), or '
            'torch.multiprocessing.set_start_method("spawn")) and load the model there'
        )


def in_fresh_thread(job: Callable[[], T]) -> T:
    """Run `job` where OpenMP works: in a forked process in a new thread. Returns or raises what `job` does."""
    if not _forks:
        return job()
    outcome: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(job())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="hf_async_batching_start", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return outcome[0]


def _before() -> None:
    global _cuda_in_parent
    _cuda_in_parent = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def _in_child() -> None:
    global _forks
    _forks += 1
    for lock in list(_locks):
        lock.renew()
    for owner in list(_renewed):
        owner.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_in_child)
