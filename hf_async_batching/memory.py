"""How much memory is free where a model runs, and when Python looks for what nobody needs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now, torch's own cached blocks included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


def return_memory(device: torch.device) -> None:
    """Give torch's cached blocks back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def no_collections() -> Iterator[None]:
    """Python's collector of cycles waits meanwhile.

    What a start makes sets off a collection of everything, which with torch and transformers loaded stops all threads
    for 0.2 to 0.4 s.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
