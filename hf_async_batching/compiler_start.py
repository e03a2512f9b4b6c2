"""Brings Triton up in a thread of its own, while the model is looked at.

Before its first kernel Triton loads its compilers, builds a library that talks to the driver, and hashes its own
files: more than a second, and each thread that compiles does it for itself where nobody did it before.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from hf_async_batching.argmax import argmax
from hf_async_batching.devices.cuda import synchronize_device

logger = logging.getLogger(__name__)

_starting: Future[None] | None = None
_lock = threading.Lock()


def start_compiler(device: torch.device, dtype: torch.dtype, vocab: int) -> None:
    """Begin, once in a process and on CUDA only; returns at once.

    Args:
        device: Where kernels will run.
        dtype: Of the model: the first kernels are those that find the largest of its logits.
        vocab: Of the model.
    """
    global _starting
    if device.type != "cuda":
        return
    with _lock:
        if _starting is not None:
            return
        # Python lets an executor's threads end before it takes down what they use.
        pool = ThreadPoolExecutor(1, thread_name_prefix="hf_async_batching_compiler")
        _starting = pool.submit(_start, device, dtype, vocab)
        pool.shutdown(wait=False)


def after_compiler_start(job: Callable[[], object]) -> Callable[[], object]:
    """The job, which begins when Triton is up; at once where nobody has started it."""

    def run() -> object:
        if _starting is not None:
            _starting.result()
        return job()

    return run


def _start(device: torch.device, dtype: torch.dtype, vocab: int) -> None:
    try:
        with torch.inference_mode(), torch.cuda.device(device):
            argmax(torch.zeros(2, vocab, dtype=dtype, device=device))
            synchronize_device(device)
    except Exception:  # whoever needs a kernel meets it again, and says so
        logger.debug("the compiler did not start", exc_info=True)
