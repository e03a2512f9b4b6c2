"""A process for each class: what becomes of it harms no other."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_async_batching.coverage import processes
from hf_async_batching.coverage.processes import Checked, check_families, start_method
from hf_async_batching.coverage.verdicts import Finding, Verdict

EXACT = Verdict("exact", "", "packed", 20, Finding("exact"), "the same")


def fake(name: str, device: str, dtype: str, report: Callable[[Verdict], object]) -> Verdict:
    """What each name says."""
    if "Submit" in name:
        report(Verdict("exact", "", "packed", 20))
    if "Hangs" in name:
        _hang()
    if "Exits" in name:
        os._exit(3)
    if "Crashes" in name:
        ctypes.string_at(0)
    if "Raises" in name:
        raise ZeroDivisionError("oh")
    if "Asserts" in name:
        line = "/torch/Indexing.cu:1422: select: block: [0,0,0], thread: [5,0,0] Assertion `index < size` failed.\n"
        os.write(2, line.encode() * 5000)
        return Verdict("crashed", "RuntimeError: CUDA error: device-side assert triggered")
    if "Looks" in name:
        started = multiprocessing.current_process()
        settings = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.get_num_threads()
        text = f"{device} {dtype} {settings} {torch.cuda.is_initialized()} {os.getppid()} {type(started).__name__}"  # type: ignore[no-untyped-call]
        return Verdict("refused", text)
    return EXACT


def _hang() -> None:
    time.sleep(600)


def _check(*names: str, **arguments: float) -> dict[str, Checked]:
    settings = {"workers": 3, "timeout": 120.0, **arguments}
    return {each.name: each for each in check_families(names, check=fake, **settings)}  # type: ignore[arg-type]


def test_a_process_that_crashes_or_exits_harms_no_other() -> None:
    found = _check("Exits", "Crashes", "SubmitCrashes", "Raises", "Asserts", "Good")
    verdicts = {name: each.verdict for name, each in found.items()}
    assert verdicts["Exits"] == Verdict("crashed", "the process ended with status 3")
    assert verdicts["Crashes"].status == verdicts["Crashes"].generate.status == "crashed"
    assert "SIGSEGV" in verdicts["Crashes"].reason
    assert "ctypes" in found["Crashes"].log  # the stack
    # What was known before is kept.
    assert (verdicts["SubmitCrashes"].status, verdicts["SubmitCrashes"].route) == ("exact", "packed")
    assert verdicts["SubmitCrashes"].generate.status == "crashed"
    assert verdicts["Raises"] == Verdict("failed", "ZeroDivisionError: oh")
    assert "Traceback" in found["Raises"].log
    assert verdicts["Asserts"].reason == (
        "RuntimeError: CUDA error: device-side assert triggered: "
        "/torch/Indexing.cu:1422: select: Assertion `index < size` failed"
    )
    assert found["Good"] == Checked("Good", EXACT)


def test_a_process_that_hangs_is_ended_and_says_where_it_was() -> None:
    _check("Good")  # starts the server
    begun = time.monotonic()
    found = _check("Hangs", "SubmitHangs", "Good", timeout=5.0)
    assert time.monotonic() - begun < 60
    assert found["Hangs"].verdict.status == "timed out"
    assert "not done at its limit, in test_processes.py" in found["Hangs"].verdict.reason
    assert "_hang" in found["Hangs"].verdict.reason
    assert "Timeout (" in found["Hangs"].log
    verdict = found["SubmitHangs"].verdict
    assert (verdict.status, verdict.generate.status) == ("exact", "timed out")
    assert found["Good"].verdict == EXACT


def test_forks_of_a_server_that_touched_no_gpu() -> None:
    """Two processes have one parent, which is not this process: torch and transformers are imported once."""
    found = [each.verdict.reason.split() for each in _check("Looks1", "Looks2").values()]
    assert found[0] == found[1]
    *_, initialized, parent, kind = found[0]
    assert (initialized, kind) == ("False", "ForkServerProcess")
    assert int(parent) != os.getpid()
    assert " ".join(found[0]).startswith("cpu float32 ('highest', False, 1)")
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"


def test_what_is_preloaded_touches_no_gpu() -> None:
    for name in processes._PRELOADED:
        assert name in sys.modules or __import__(name)
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def test_no_class_is_begun_after_the_limit() -> None:
    assert _check("Good", until=time.monotonic() - 1) == {}


@pytest.mark.parametrize("works_with", ["forkserver", "spawn", ""])
def test_how_processes_are_started_on_a_gpu(monkeypatch: pytest.MonkeyPatch, works_with: str) -> None:
    """Something that a release imports may touch the GPU: then no fork can use it, and a new Python can."""
    probes = {"forkserver": _works_in_forks, "spawn": _works_in_new_processes, "": _works_nowhere}
    monkeypatch.setattr(processes, "_probe", probes[works_with])
    if works_with:
        assert start_method("cuda") == (works_with, "a card")
        return
    with pytest.raises(RuntimeError, match="cuda cannot be used: no card"):
        start_method("cuda")


def test_no_gpu_is_asked_for_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_probe", None)
    assert start_method("cpu") == ("forkserver", "")


def _kind() -> str:
    return type(multiprocessing.current_process()).__name__


def _works_in_forks(_: str, sender: multiprocessing.connection.Connection) -> None:
    works = _kind() == "ForkServerProcess"
    sender.send((works, "a card" if works else "no card"))


def _works_in_new_processes(_: str, sender: multiprocessing.connection.Connection) -> None:
    works = _kind() == "SpawnProcess"
    sender.send((works, "a card" if works else "no card"))


def _works_nowhere(_: str, sender: multiprocessing.connection.Connection) -> None:
    sender.send((False, "no card"))


def test_logs_of_any_size(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert processes._told(log) == ""
    log.write_text("x" * 300_000 + "\nFatal Python error: Aborted\n")
    assert processes._told(log) == ": Fatal Python error: Aborted"
    assert len(processes._read(log)) <= 2 * processes._LOG_BYTES
