"""Runs jobs of a start side by side: most of what compilers and loading libraries do needs no lock of Python."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from hf_async_batching.autocast import Autocast
from hf_async_batching.devices.cuda import synchronize_device


def side_by_side(jobs: list[Callable[[], object]], device: torch.device) -> None:
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
        for job in jobs:  # the interpreter gains nothing by threads, and has never been promised to bear them
            run(job)
        return
    synchronize_device(device)
    # Compilers' front ends do need Python's lock: with more of them at once, each gets to its long part later.
    with ThreadPoolExecutor(3, thread_name_prefix="hf_async_batching_kernels") as pool:
        for done in [pool.submit(run, job) for job in jobs]:
            done.result()
    synchronize_device(device)
