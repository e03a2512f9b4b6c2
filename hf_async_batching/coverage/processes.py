"""Check classes in parallel, each in its own process, so that a crash or a hang does not affect the others.

A fork server imports torch, transformers and the library once, and touches no GPU. Each class is checked in a fork of
it. A log gets what a class prints, its stack if it is ended at its time limit, and assertions of GPU kernels.
"""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import re
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from hf_async_batching.coverage.families import check_family
from hf_async_batching.coverage.verdicts import UNFINISHED, Finding, Status, Verdict

# Seconds after its time limit in which a process writes its stack.
_GRACE = 2.0
_LOG_BYTES = 1 << 16
_LINE_CHARACTERS = 2000
_FRAMES = 3
_PRELOADED = (
    "hf_async_batching.coverage.processes",
    "hf_async_batching.attention.triton_backend",
    "hf_async_batching.cli.main",
)


class Check(Protocol):
    """Checks an entry; see `check_family`. Another process calls it, so pickle must find it by its name."""

    def __call__(self, name: str, device: str, dtype: str, report: Callable[[Verdict], object]) -> Verdict:
        """Check one entry; `report` is called with the verdict so far."""


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of an entry.

    Attributes:
        name: Name of the entry.
        verdict: The verdict.
        log: The end of what the process printed, if the check did not finish; otherwise empty.
    """

    name: str
    verdict: Verdict
    log: str = ""


@dataclass(slots=True)
class _Running:
    name: str
    process: Any
    deadline: float
    log: Path
    so_far: Verdict | None = None


def check_families(
    names: Iterable[str],
    *,
    device: str = "cpu",
    dtype: str = "float32",
    workers: int = 2,
    timeout: float = 600.0,
    until: float = float("inf"),
    method: str = "forkserver",
    check: Check = check_family,
) -> Iterator[Checked]:
    """Check entries in parallel.

    Args:
        names: Names of entries; see `entry_names`.
        device: Device of the models.
        dtype: Dtype of their weights.
        workers: Number of processes at a time.
        timeout: Time limit per entry, in seconds.
        until: Time on `time.monotonic`'s clock after which no process is started. Running processes finish.
        method: How to start processes: "forkserver" or "spawn"; see `start_method`.
        check: The check that each process runs.

    Yields:
        The result of each entry, in order of completion.
    """
    context = _context(method)
    todo = list(names)[::-1]
    running: dict[Any, _Running] = {}
    ended: list[Any] = []
    with tempfile.TemporaryDirectory() as logs:
        try:
            while todo or running:
                while todo and len(running) < workers and time.monotonic() < until:
                    name = todo.pop()
                    log = Path(logs, f"{name}.log")
                    deadline = time.monotonic() + timeout
                    receiver, sender = context.Pipe(duplex=False)
                    arguments = (check, name, device, dtype, sender, str(log), deadline)
                    process = context.Process(target=_check, args=arguments, daemon=True)
                    process.start()
                    sender.close()
                    running[receiver] = _Running(name, process, deadline + _GRACE, log)
                if not running:
                    return
                first_deadline = min(each.deadline for each in running.values())
                ready = set(wait(list(running), max(0.0, first_deadline - time.monotonic())))
                for receiver, each in list(running.items()):
                    verdict = _news(receiver, each, receiver in ready)
                    if verdict is None:
                        continue
                    receiver.close()
                    each.process.kill()
                    # A process that has used a GPU takes a while to end; the others need not wait for it.
                    ended = [process for process in (*ended, each.process) if process.exitcode is None]
                    del running[receiver]
                    unfinished = {verdict.status, verdict.generate.status} & UNFINISHED
                    yield Checked(each.name, verdict, _end_of(each.log) if unfinished else "")
        finally:
            for process in (*ended, *(each.process for each in running.values())):
                process.kill()
                process.join()


def start_method(device: str) -> tuple[str, str]:
    """Find out how to start processes that can use a device.

    Returns:
        The method and the device's name. The method is "forkserver", or "spawn" if an imported package has touched the
        GPU: forks cannot use it then.

    Raises:
        RuntimeError: No process can use the device.
    """
    if not device.startswith("cuda"):
        return "forkserver", ""
    for method in ("forkserver", "spawn"):
        context = _context(method)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_probe, args=(device, sender), daemon=True)
        process.start()
        sender.close()
        works, text = receiver.recv() if receiver.poll(120) else (False, "no answer in two minutes")
        process.kill()
        if works:
            return method, text
    raise RuntimeError(f"{device} cannot be used: {text}")


def _context(method: str) -> Any:
    # Torch then looks for GPUs without initializing the driver, so forks can use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(list(_PRELOADED))
    return context


def _probe(device: str, sender: Connection) -> None:
    try:
        torch.zeros(1, device=device).add_(1).item()
        sender.send((True, torch.cuda.get_device_name(device)))
    except Exception as error:
        sender.send((False, f"{type(error).__name__}: {str(error).splitlines()[0]}"))


def _news(receiver: Connection, each: _Running, ready: bool) -> Verdict | None:
    """The verdict on a running process, or None if there is none yet."""
    if ready:
        try:
            last, verdict = receiver.recv()
        except (EOFError, OSError):
            each.process.join(_GRACE)
            return _ended("crashed", f"{_exit(each.process.exitcode)}{_told(each.log)}", each.so_far)
        if not last:
            each.so_far = verdict
            return None
        found: Verdict = verdict
        if found.status == "crashed":
            found = replace(found, reason=found.reason + _told(each.log))
        elif found.drop_in is not None and found.drop_in.status == "crashed":
            drop_in = replace(found.drop_in, reason=found.drop_in.reason + _told(each.log))
            found = replace(found, drop_in=drop_in)
        return found
    if time.monotonic() < each.deadline:
        return None
    stack = _stack(each.log)
    return _ended("timed out", "not done at its limit" + (f", in {stack}" if stack else ""), each.so_far)


def _ended(status: Status, reason: str, so_far: Verdict | None) -> Verdict:
    if so_far is None:
        return Verdict(status, reason)
    if so_far.drop_in is None:
        return replace(so_far, drop_in=Finding(status, reason))
    return replace(so_far, plain_padded="fails")  # both ways in were seen


def _check(check: Check, name: str, device: str, dtype: str, sender: Connection, log: str, deadline: float) -> None:
    # Families print, warn and log a lot about configs of untrained models.
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable(file)
    faulthandler.dump_traceback_later(max(0.01, deadline - time.monotonic()), file=file)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    # Full float32 precision: images for GPUs may switch TF32 on.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        verdict = check(name, device, dtype, lambda so_far: sender.send((False, so_far)))
    except Exception as error:
        traceback.print_exc()
        verdict = Verdict("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
    sender.send((True, verdict))
    sender.close()


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"the process ended by {signal.Signals(-code).name}"
    return f"the process ended with status {code}"


def _read(log: Path) -> str:
    """The start and the end of a log: a kernel's assertion is printed once per thread of the kernel."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        head = file.read(_LOG_BYTES)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(len(head), size - _LOG_BYTES))
        return (head + file.read()).decode(errors="replace")


def _end_of(log: Path, lines: int = 60) -> str:
    return "\n".join(_read(log).splitlines()[-lines:])


def _told(log: Path) -> str:
    """The line of the log that describes a crash, formatted to follow a reason."""
    # The patterns take the square of a line's length.
    text = "\n".join(line[:_LINE_CHARACTERS] for line in _read(log).splitlines())
    for pattern in (r"\S*: .*Assertion .* failed", r"Fatal Python error: .*", r"CUDA error: .*", r"\w*Error: .*"):
        if found := re.search(pattern, text):
            line = found.group().strip()
            # The block and the thread do not matter.
            return f": {re.sub(r': block: .*thread: [^ ]* ', ': ', line)}"
    return ""


def _stack(log: Path) -> str:
    """The innermost frames of the main thread, which faulthandler writes last."""
    stack = _read(log).rpartition("Timeout (")[2].rpartition("Thread 0x")[2]
    frames = re.findall(r'File "(.*)", line (\d+) in (\S+)', stack)
    return " < ".join(f"{Path(file).name}:{line} {name}" for file, line, name in frames[:_FRAMES])
