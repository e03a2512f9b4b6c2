"""Measures the memory, threads and open descriptors of the process, and checks that memory stays flat."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.soak.holders import holders
from hf_async_batching.core.request import Request
from hf_async_batching.handle import GenerationHandle
from hf_async_batching.host_decoding.logits_handle import LogitsHandle

MIB = 1 << 20
# Allocators keep their largest memory, so growth below this says nothing, however long it takes.
NOISE_MIB = 32.0
ENOUGH_MINUTES = 2.0
_MOST_SHOWN = 3
# Before this share of the time, and in these first seconds, allocators still fill.
_WARM_SHARE, _WARM_SECONDS = 0.35, 240.0


@dataclass(frozen=True, slots=True)
class Held:
    """The resources of a process at one moment.

    Attributes:
        at: `time.perf_counter()`.
        rss: Resident memory in bytes.
        allocated: Memory of tensors on the CUDA device in bytes; 0 without a device.
        reserved: Memory that torch's allocator holds on the device.
        threads: Python's threads.
        os_threads: All threads of the process.
        descriptors: Open files, pipes and sockets.
    """

    at: float
    rss: int
    allocated: int
    reserved: int
    threads: int
    os_threads: int
    descriptors: int

    def __str__(self) -> str:
        cuda = f", CUDA {self.allocated / MIB:.0f} of {self.reserved / MIB:.0f} MiB" if self.reserved else ""
        return (
            f"RSS {self.rss / MIB:.0f} MiB{cuda}, {self.threads} threads ({self.os_threads} of the system), "
            f"{self.descriptors} descriptors"
        )


def held() -> Held:
    """Measure this process now; on Linux only."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(
        at=time.perf_counter(),
        rss=pages * os.sysconf("SC_PAGE_SIZE"),
        allocated=torch.cuda.memory_allocated() if cuda else 0,
        reserved=torch.cuda.memory_reserved() if cuda else 0,
        threads=threading.active_count(),
        os_threads=len(os.listdir("/proc/self/task")),
        descriptors=len(os.listdir("/proc/self/fd")) - 1,  # one of them reads the folder
    )


def return_freed_memory() -> None:
    """Make the C library return free memory. With many threads it keeps much, and that would look like a leak."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# The objects of a request, for its caller and for the engine.
_KINDS = (GenerationHandle, LogitsHandle, Request)


def known_objects() -> frozenset[int]:
    """Return the identities of existing requests and handles, which other code in the process may hold."""
    gc.collect()
    return frozenset(id(one) for one in gc.get_objects() if type(one) in _KINDS)


def live_objects(known: frozenset[int]) -> dict[str, int]:
    """Count the requests and handles that are still referenced after a collection, by type.

    Args:
        known: Identities of objects that existed before.
    """
    return {name: len(alive) for name, alive in _alive(known).items()}


def held_objects(known: frozenset[int]) -> dict[str, int]:
    """Count as `live_objects`, and name what holds some of the objects; with any, this takes a second or more."""
    found: Counter[str] = Counter()
    for name, alive in _alive(known).items():
        shown = alive[:_MOST_SHOWN]
        own: list[Any] = [alive, shown]
        for _ in range(len(shown)):
            found[f"{name} (held in {holders(shown.pop(), own)})"] += 1
        if len(alive) > _MOST_SHOWN:
            found[f"{name}, not looked at"] += len(alive) - _MOST_SHOWN
    return dict(found)


def _alive(known: frozenset[int]) -> dict[str, list[object]]:
    gc.collect()
    alive: dict[str, list[object]] = {}
    for one in gc.get_objects():
        if type(one) in _KINDS and id(one) not in known:
            alive.setdefault(type(one).__name__, []).append(one)
    return alive


def slope(samples: list[tuple[float, float]]) -> float:
    """Return the median of the slopes between samples (Theil and Sen); a few peaks do not change it.

    Args:
        samples: Times and values.

    Returns:
        Change of the value per unit of time; 0 for fewer than two samples.
    """
    kept = samples[:: max(1, len(samples) // 200)]
    slopes = [
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for index, earlier in enumerate(kept)
        for later in kept[index + 1 :]
        if later[0] > earlier[0]
    ]
    return statistics.median(slopes) if slopes else 0.0


@dataclass(frozen=True, slots=True)
class Growth:
    """The growth of memory after the warm-up.

    Attributes:
        name: Kind of memory.
        per_minute: Growth in MiB per minute.
        minutes: Measured time in minutes.
        bound: Allowed growth in MiB per minute.
    """

    name: str
    per_minute: float
    minutes: float
    bound: float

    @property
    def flat(self) -> bool:
        """Whether growth is below the bound or within an allocator's noise; also true if the time is too short."""
        return self.minutes < ENOUGH_MINUTES or self.per_minute * self.minutes <= max(
            NOISE_MIB, self.bound * self.minutes
        )

    def __str__(self) -> str:
        allowed = f"allowed: {self.bound:g}, or {NOISE_MIB:g} MiB altogether"
        if self.minutes < ENOUGH_MINUTES:
            allowed = f"too short to judge: {ENOUGH_MINUTES:g} minutes are needed"
        return f"{self.name} {self.per_minute:+.2f} MiB a minute over {self.minutes:.1f} minutes ({allowed})"


def growth(samples: list[Held], bound: float) -> list[Growth]:
    """Return the growth of resident memory after the warm-up, and of allocated memory on a CUDA device.

    Args:
        samples: Samples in the order of time.
        bound: Allowed growth in MiB per minute.
    """
    if not samples:
        return []
    first, last = samples[0].at, samples[-1].at
    warm = first + min(_WARM_SHARE * (last - first), _WARM_SECONDS)
    steady = [sample for sample in samples if sample.at >= warm]
    minutes = (last - warm) / 60
    kinds = [("RSS", [(one.at / 60, one.rss / MIB) for one in steady])]
    if any(one.reserved for one in steady):
        kinds.append(("CUDA allocated", [(one.at / 60, one.allocated / MIB) for one in steady]))
    return [Growth(name, slope(points), minutes, bound) for name, points in kinds]
