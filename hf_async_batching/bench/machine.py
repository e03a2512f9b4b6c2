"""The machine of a measurement: the card, its bandwidth, the versions."""

from __future__ import annotations

import platform
import shutil
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch
import transformers

from hf_async_batching.devices.base import Guard, Stream
from hf_async_batching.devices.select import make_device

_COPIES = 20
_UNCOUNTED_COPIES = 3


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that produced a figure.

    Attributes:
        card: The GPU's name, or the CPU's.
        copy_bandwidth: Bytes per second, read plus written, of a large copy in this process.
        versions: Versions by name; None for a package that is absent.
    """

    card: str
    copy_bandwidth: float
    versions: dict[str, str | None]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        return f"{self.card}; copy bandwidth {self.copy_bandwidth / 1e12:.3f} TB/s; {versions}"


def look_at(device: torch.device) -> Machine:
    """Measure and describe the machine of `device`."""
    import hf_async_batching

    cuda = device.type == "cuda"
    triton: str | None = None
    with suppress(ImportError):
        triton = str(import_module("triton").__version__)
    versions = {
        "hf_async_batching": hf_async_batching.__version__,
        "torch": str(torch.__version__),
        "triton": triton,
        "transformers": str(transformers.__version__),
        "python": platform.python_version(),
        "CUDA": str(torch.version.cuda) if cuda else None,
        "driver": _driver() if cuda else None,
    }
    threads = torch.get_num_threads()
    card = torch.cuda.get_device_name(device) if cuda else f"CPU, {threads} thread{'' if threads == 1 else 's'}"
    return Machine(card, copy_bandwidth(device), versions)


def copy_bandwidth(device: torch.device, gib: float | None = None) -> float:
    """Return the bytes per second, read plus written, of a large copy on `device`; the median of 20 copies.

    Args:
        device: The device that holds both ends of the copy.
        gib: Size of the copy; by default 2 on CUDA and 1/8 on the CPU, far more than the caches hold.
    """
    size = int((gib or (2.0 if device.type == "cuda" else 0.125)) * (1 << 30)) // 4
    source = torch.ones(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    # The device is made after the tensors: its streams wait for all work that was enqueued before.
    streams = make_device(device)
    events = []

    def copy() -> None:
        target.copy_(source)

    for _ in range(_UNCOUNTED_COPIES + _COPIES):
        start = streams.record(Stream.COMPUTE)
        streams.launch(Stream.COMPUTE, copy)
        events.append((start, streams.record(Stream.COMPUTE)))
    streams.synchronize(events[-1][1], Guard.RESULT_READY)
    seconds = sorted(streams.time_of(end) - streams.time_of(start) for start, end in events[_UNCOUNTED_COPIES:])
    streams.close()
    return 2 * source.nbytes / seconds[_COPIES // 2]


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout else None
