"""Runs the jobs of a start in parallel: compilers and library loading mostly run without Python's lock."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from hf_async_batching.devices.cuda import synchronize_device
from hf_async_batching.runtime.autocast import Autocast

# Compilers' front ends need Python's lock: with more threads, each job reaches its long part later.
_THREADS = 3


def run_parallel(jobs: list[Callable[[], object]], device: torch.device) -> None:
    """Run all jobs; returns when they have ended, on the device too.

    On CUDA each runs in a thread, whose stream is not the caller's: they begin behind what the device has to do, and
    what the caller enqueues next comes behind them.

    Args:
        jobs: What to run, in inference mode and under the caller's autocast, in any order.
        device: The current device of the jobs.

    Raises:
        Exception: What the first job that failed raised.
    """
    autocast = Autocast.of_this_thread(device.type)

    def run(job: Callable[[], object]) -> None:
        with torch.inference_mode(), autocast():
            if device.type == "cuda":
                with torch.cuda.device(device):
                    job()
            else:
                job()

    if device.type != "cuda":
        for job in jobs:  # the interpreter gains nothing from threads and may not be thread-safe
            run(job)
        return
    synchronize_device(device)
    run_in_threads([lambda job=job: run(job) for job in jobs])  # type: ignore[misc]
    synchronize_device(device)


def run_in_threads(jobs: list[Callable[[], object]]) -> None:
    """Run jobs in a few threads; returns when all have ended. Interrupted, it begins no more of them.

    An executor would not do: it refuses work once the main thread has ended, and other threads may outlive it.

    Raises:
        BaseException: What the first job that failed raised.
    """
    errors: dict[int, BaseException] = {}
    left = list(enumerate(jobs))[::-1]
    running, changed = 0, threading.Condition()

    def work() -> None:
        nonlocal running
        while True:
            with changed:
                if not left:
                    return
                number, job = left.pop()
                running += 1
            try:
                job()
            except BaseException as error:
                errors[number] = error
            finally:
                with changed:
                    running -= 1
                    changed.notify()

    try:
        for number in range(min(_THREADS, len(jobs))):
            # No daemon, whatever this thread is: Python would end it in the middle of a compiler.
            threading.Thread(target=work, name=f"hf_async_batching_start_{number}", daemon=False).start()
        with changed:
            changed.wait_for(lambda: not left and not running)
    finally:
        # Jobs that have begun use the caller's model and device.
        with changed:
            left.clear()
            changed.wait_for(lambda: not running)
    if errors:
        raise errors[min(errors)]
