"""Brings Triton up in threads of its own, while the model is looked at.

Before its first kernel Triton loads its languages, builds a library that talks to the driver, and hashes its own
files: more than a second, and each thread that compiles does it for itself where nobody did it before.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch

logger = logging.getLogger(__name__)

_starting: list[threading.Thread] = []
_lock = threading.Lock()


def start_compiler(device: torch.device) -> None:
    """Begin, once in a process and on CUDA only; returns at once."""
    if device.type != "cuda":
        return
    with _lock:
        if _starting:
            return
        for step in (_hash_files, partial(_connect, device)):
            # No daemon: Python takes down what a daemon uses while it runs.
            thread = threading.Thread(target=_quietly, args=(step,), name="hf_async_batching_compiler")
            thread.start()
            _starting.append(thread)


def after_compiler_start(job: Callable[[], object]) -> Callable[[], object]:
    """The job, which begins when Triton is up; at once where nobody has started it."""

    def run() -> object:
        for thread in _starting:  # in a forked process they count as ended
            thread.join()
        return job()

    return run


def _hash_files() -> None:
    import_module("triton.runtime.cache").triton_key()


def _connect(device: torch.device) -> None:
    with torch.cuda.device(device):
        import_module("triton.runtime").driver.active.get_current_target()
    # What the first launch of any kernel imports.
    import_module("triton.experimental.gluon.nvidia.hopper")


def _quietly(step: Callable[[], None]) -> None:
    try:
        step()
    except Exception:  # another release keeps it elsewhere, or there is none: the first kernel will tell
        logger.debug("Triton did not come up early", exc_info=True)
