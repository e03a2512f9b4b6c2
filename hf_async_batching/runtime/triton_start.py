"""Start Triton in separate threads while the model is inspected.

Before its first kernel Triton loads its languages, builds a library that talks to the driver, and hashes its own
files. This takes more than a second, and each compiling thread repeats it unless it was done before.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch

from hf_async_batching.runtime.forking import ForkSafeLock

logger = logging.getLogger(__name__)

_starting: list[threading.Thread] = []
_lock = ForkSafeLock()


def runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device."""
    return device.type == "cuda" and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def start_compiler(device: torch.device) -> None:
    """Start Triton once per process, if its kernels run on the device; returns at once."""
    if not runs_triton(device):
        return
    with _lock:
        if _starting:
            return
        for step in (_hash_files, functools.partial(_connect, device)):
            # Never a daemon: at exit, Python tears down modules that a running daemon still uses.
            thread = threading.Thread(target=_quietly, args=(step,), name="hf_async_batching_compiler", daemon=False)
            thread.start()
            _starting.append(thread)


def after_compiler_start(job: Callable[[], object]) -> Callable[[], object]:
    """Delay a job until Triton has started; without a start, the job runs at once."""

    def run() -> object:
        for thread in _starting:  # in a forked process these threads count as ended
            thread.join()
        return job()

    return run


def _hash_files() -> None:
    import_module("triton.runtime.cache").triton_key()


def _connect(device: torch.device) -> None:
    with torch.cuda.device(device):
        import_module("triton.runtime").driver.active.get_current_target()
    # Modules that the first launch of any kernel imports.
    import_module("triton.experimental.gluon.nvidia.hopper")


def _quietly(step: Callable[[], None]) -> None:
    try:
        step()
    except Exception:  # another release has it elsewhere; then the first kernel starts Triton
        logger.debug("Triton did not come up early", exc_info=True)
