"""The sanitizer's logs are read right, its runs are judged right, and the scenarios run."""

from __future__ import annotations

import json
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

import hf_async_batching
from benchmarks.sanitize import command, finder
from benchmarks.sanitize.finder import NAME, SanitizerNotFoundError, find_sanitizer
from benchmarks.sanitize.kernel_names import is_ours, package_kernels
from benchmarks.sanitize.runs import (
    ALONE,
    DEFAULT_TOOLS,
    ERRORS_FOUND,
    TOOLS,
    SanitizerRun,
    command_of,
    environment_of,
    judge,
    plan_runs,
)
from benchmarks.sanitize.sanitizer_log import Frame, Report, read_log
from benchmarks.sanitize.scenarios import ONE_BY_ONE, SCENARIOS, WITHOUT_PDL

HEAD = "========= COMPUTE-SANITIZER\n"

MEMCHECK = f"""{HEAD}a line of the program's own
========= Invalid __global__ read of size 4 bytes
=========     at decode_kernel+0xec0 in triton_decode.py:343
=========     by thread (18,0,0) in block (0,3,0)
=========     Access to 0x74505bcccca0 is out of bounds
=========     and is 161 bytes after the nearest allocation at 0x74505bccc800 of size 1,024 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========     Host Frame: cuLaunchKernel [0x297db6] in libcuda.so.1
=========
========= Invalid __global__ read of size 4 bytes
=========     at decode_kernel+0xed0 in triton_decode.py:343
=========     by thread (19,0,0) in block (0,3,0)
=========     Address 0x74505bcccca4 is out of bounds
=========
========= Invalid __shared__ write of size 16 bytes
=========     at 0x150 in void at::native::index_kernel<int=256>(unsigned int const *,int,int*)
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7fc406200400 is misaligned
=========     Device Frame:void at::native::outer_kernel<float>(int) [0x520]
=========
========= ERROR SUMMARY: 3 errors
"""

INITCHECK = f"""{HEAD}========= Uninitialized __global__ memory read of size 2 bytes
=========     at sum+0x70 in standard.py:41
=========     by thread (31,0,0) in block (1,0,0)
=========     Address 0x7f3c7ec000fc
=========     Device Frame: _combine_splits__fp32S1S1_c64+0x90 in triton_decode.py:190
=========     Device Frame: combine_kernel+0x100 in triton_decode.py:420
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0xa0a50 in /usr/local/cuda/include/cub/thread_load.cuh:272:ThreadLoad<LOAD_CG,const unsigned int *>
=========     by thread (30,0,0) in block (1,0,0)
=========     Address 0x7f65e5204710
=========
========= Host API memory access error at host access to 0x7f7fcdc01200 of size 400 bytes
=========     Uninitialized access at 0x7f7fcdc01300 on access by cudaMemcpy source
=========
========= ERROR SUMMARY: 1,003 errors
========= ERROR SUMMARY: 1,000 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""

RACECHECK = f"""{HEAD}========= Error: Race reported between Write access at prefill_kernel+0xf0 in prefill.py:12
=========     and Read access at prefill_kernel+0xd0 in prefill.py:14 [32 hazards]
=========     and Write access at prefill_kernel+0xf0 in prefill.py:12 [4 hazards]
=========
========= WARN: Race reported between Read access at 0x78 in sgemm_32x32x32_NT_vec
=========     and Write access at 0x68 in sgemm_32x32x32_NT_vec [20 hazards]
=========
========= Error: Race reported between Write access at
=========     race_condition(float *)+0xb0 in 18_debug_demo.cu:28
=========     and Read access at
=========     race_condition(float *)+0xc0 in 18_debug_demo.cu:30
=========     [1,024 hazards]
=========
========= ERROR: Potential WAW hazard detected at __shared__ 0x0 in block (0,0,0) :
=========     Write Thread (0,0,0) at triton_red_fused_0+0x2f0 in cab.py:20
=========     Write Thread (1,0,0) at triton_red_fused_0+0x2f0 in cab.py:20
=========     Current Value : 1, Incoming Value : 2
=========
========= RACECHECK SUMMARY: 4 hazards displayed (3 errors, 1 warning)
"""

SYNCCHECK = f"""{HEAD}========= Barrier error detected. Divergent thread(s) in block
=========     at 0x2c8 in skinny_linear_kernel
=========     by thread (17,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""

CLEAN = f"{HEAD}========= ERROR SUMMARY: 0 errors\n"
NAMES = package_kernels()


def test_memcheck() -> None:
    log = read_log(MEMCHECK)
    assert log.reports == (
        Report("Invalid __global__ read of size 4 bytes", "error", (Frame("decode_kernel", "triton_decode.py:343"),)),
        Report("Invalid __global__ read of size 4 bytes", "error", (Frame("decode_kernel", "triton_decode.py:343"),)),
        Report(
            "Invalid __shared__ write of size 16 bytes",
            "error",
            (
                Frame("void at::native::index_kernel<int=256>(unsigned int const *,int,int*)", ""),
                Frame("void at::native::outer_kernel<float>(int)", ""),
            ),
        ),
    )
    assert (log.summary, log.not_printed, log.troubles) == (3, 0, ())


def test_initcheck() -> None:
    log = read_log(INITCHECK)
    kernels = [(report.kernel, report.place) for report in log.reports]
    assert kernels == [
        ("combine_kernel", "standard.py:41"),
        ("ThreadLoad<LOAD_CG,const unsigned int *>", "/usr/local/cuda/include/cub/thread_load.cuh:272"),
        ("", ""),
    ]
    assert log.reports[0].kind == "Uninitialized __global__ memory read of size 2 bytes"
    assert log.reports[2].kind == "Uninitialized source of cudaMemcpy"
    assert (log.summary, log.not_printed) == (1003, 1000)


def test_racecheck() -> None:
    log = read_log(RACECHECK)
    assert [(r.kind, r.severity, r.kernel, r.place, r.hazards) for r in log.reports] == [
        ("Race between Write and Read and Write access", "error", "prefill_kernel", "prefill.py:12", 36),
        ("Race between Read and Write access", "warning", "sgemm_32x32x32_NT_vec", "", 20),
        ("Race between Write and Read access", "error", "race_condition(float *)", "18_debug_demo.cu:28", 1024),
        ("Potential WAW hazard detected at __shared__", "error", "triton_red_fused_0", "cab.py:20", 1),
    ]
    assert log.summary == 4


def test_synccheck_and_troubles() -> None:
    (report,) = read_log(SYNCCHECK).reports
    assert report.kind == "Barrier error detected. Divergent thread(s)"
    assert report.kernel == "skinny_linear_kernel"
    log = read_log(
        f"{HEAD}========= Error: process didn't terminate successfully\n"
        "=========     The application may have hit an error when dereferencing Unified Memory from the host.\n"
        "========= Error: Target application terminated before first instrumented API call\n"
    )
    assert log.summary is None
    assert not log.reports
    assert len(log.troubles) == 2
    assert read_log("") == read_log("no line of the tool\n")


def test_the_packages_kernels_are_known() -> None:
    """As many as there are decorators, whatever module they are in."""
    assert {"decode_kernel", "prefill_kernel", "write_kv_kernel", "parts_kernel", "skinny_linear_kernel"} <= NAMES
    sources = [file.read_text() for file in Path(str(hf_async_batching.__file__)).parent.rglob("*.py")]
    decorated = [
        name
        for source in sources
        for name in re.findall(r"^@triton\.jit[^@]*?^def (\w+)", source, re.MULTILINE | re.DOTALL)
    ]
    assert set(decorated) == NAMES
    assert sum(len(re.findall(r"^@triton\.jit", source, re.MULTILINE)) for source in sources) == len(decorated)
    assert is_ours("decode_kernel", NAMES)
    assert is_ours("attend_blocks__fp32S1S1_c64", NAMES), "a function that was not inlined"
    assert is_ours("triton_poi_fused_add_0", NAMES)
    assert not is_ours("void at::native::decode_kernel<float>(float *)", NAMES)
    assert not is_ours("sm90_xmma_gemm_bf16", NAMES)


@pytest.mark.parametrize(
    ("tool", "text", "code", "status", "ours", "others", "copies"),
    [
        ("memcheck", MEMCHECK, 1, "errors", 3, 0, 0),  # torch's kernels write elsewhere only when told to
        ("initcheck", INITCHECK, ERRORS_FOUND, "errors", 1, 1, 1),
        ("racecheck", RACECHECK, ERRORS_FOUND, "errors", 37, 1044, 0),
        ("racecheck", RACECHECK.replace("prefill_kernel", "f()").replace("triton_red", "g"), 86, "clean", 0, 1081, 0),
        ("synccheck", SYNCCHECK, ERRORS_FOUND, "errors", 1, 0, 0),
        ("memcheck", CLEAN, 0, "clean", 0, 0, 0),
        ("memcheck", CLEAN, 1, "failed", 0, 0, 0),  # the scenario raised
        ("memcheck", HEAD, 0, "failed", 0, 0, 0),  # the tool did not come to its end
        ("memcheck", None, 0, "failed", 0, 0, 0),
        ("memcheck", CLEAN, None, "too long", 0, 0, 0),
        ("memcheck", f"{HEAD}========= Internal Sanitizer Error: no memory\n{CLEAN}", 0, "failed", 0, 0, 0),
        (ALONE, None, 0, "clean", 0, 0, 0),
        (ALONE, None, ERRORS_FOUND, "failed", 0, 0, 0),
    ],
)
def test_a_process_is_judged(
    tool: str, text: str | None, code: int | None, status: str, ours: int, others: int, copies: int
) -> None:
    outcome = judge(SanitizerRun(tool, "decode"), code, None if text is None else read_log(text), NAMES)
    assert outcome.status == status
    counts = [sum(finding.count for finding in found) for found in (outcome.ours, outcome.others, outcome.copies)]
    assert counts == [ours, others, copies]
    assert json.loads(json.dumps(outcome.as_json()))["tool"] == tool


def test_reports_are_grouped_by_kernel() -> None:
    outcome = judge(SanitizerRun("memcheck", "decode"), ERRORS_FOUND, read_log(MEMCHECK), NAMES)
    assert [(finding.kernel, finding.count) for finding in outcome.ours] == [
        ("decode_kernel", 2),
        ("void at::native::outer_kernel<float>(int)", 1),
    ]
    assert (
        "1000 more were not printed" in judge(SanitizerRun("initcheck", "decode"), 86, read_log(INITCHECK), NAMES).note
    )


def test_what_is_run() -> None:
    runs = plan_runs(DEFAULT_TOOLS, list(SCENARIOS), all_races=False)
    assert len(runs) == len(set(runs)) == len({run.name for run in runs})
    assert runs[0].tool == "racecheck", "what takes longest comes first"
    for name, scenario in SCENARIOS.items():
        mine = {run for run in runs if run.scenario == name}
        assert {SanitizerRun("memcheck", name, True), SanitizerRun("initcheck", name, True)} <= mine
        assert (SanitizerRun("memcheck", name) in mine) == scenario.captured
        assert (SanitizerRun("racecheck", name) in mine) == scenario.races
    assert plan_runs(["racecheck"], ["drafts"], all_races=True) == [SanitizerRun("racecheck", "drafts")]
    assert not plan_runs(["racecheck"], ["drafts"], all_races=False)


@pytest.mark.parametrize("tool", TOOLS)
def test_command_and_environment(tool: str, tmp_path: Path) -> None:
    run = SanitizerRun(tool, "decode", one_by_one=tool in ("memcheck", "initcheck"))
    words = command_of(
        run, sanitizer=Path("cs"), log=tmp_path / "log", device="cuda", slot=2, names={"decode_kernel"}, limit=7.5
    )
    assert words[:3] == ["cs", "--tool", tool]
    assert words[words.index("--log-file") + 1] == str(tmp_path / "log")
    assert words[words.index("--error-exitcode") + 1] == str(ERRORS_FOUND)
    assert words[-6:] == ["--scenario", "decode", "--device", "cuda", "--limit", "7.5"]
    # A filter would make initcheck take what other kernels wrote for unwritten.
    assert ("kne=decode_kernel" in words) == ("kns=triton_" in words) == (tool == "racecheck")
    base = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", ONE_BY_ONE: "1", "HOME": "/h"}
    environment = environment_of(run, base, device="cuda", settings=tmp_path)
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment
    assert (environment.get(ONE_BY_ONE) == "1") == run.one_by_one
    assert environment["HOME"] == "/h"
    assert "TRITON_INTERPRET" not in environment
    assert environment_of(run, base, device="cpu", settings=tmp_path)["TRITON_INTERPRET"] == "1"
    assert WITHOUT_PDL not in environment
    assert environment_of(run, base, device="cuda", settings=tmp_path, pdl=False)[WITHOUT_PDL] == "1"


def program(path: Path, script: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_program_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On PATH, in named toolkits, in installed ones, in a package, in this order; else the remedy is told."""
    monkeypatch.setattr(finder, "_PACKAGES", ("nvidia-cuda-sanitizer-api",))

    def no_package(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(finder.metadata, "files", no_package)
    toolkits = str(tmp_path / "cuda*")
    environment = {"PATH": str(tmp_path / "bin")}
    with pytest.raises(
        SanitizerNotFoundError, match=r"pip install 'nvidia-cuda-sanitizer-api.*put its folder on PATH"
    ):
        find_sanitizer(environment, toolkits)

    packaged = program(tmp_path / "site" / "bin" / NAME)

    class Located:
        def __init__(self, path: Path) -> None:
            self.name, self._path = path.name, path

        def locate(self) -> Path:
            return self._path

    monkeypatch.setattr(finder.metadata, "files", lambda name: [Located(tmp_path / "README"), Located(packaged)])
    assert find_sanitizer(environment, toolkits) == packaged
    older = program(tmp_path / "cuda-12.9" / "bin" / NAME)
    assert find_sanitizer(environment, toolkits) == older
    newer = program(tmp_path / "cuda-13.0" / "compute-sanitizer" / NAME)
    assert find_sanitizer(environment, toolkits) == newer
    home = program(tmp_path / "home" / "bin" / NAME)
    assert find_sanitizer(environment | {"CUDA_HOME": str(tmp_path / "home")}, toolkits) == home
    first = program(tmp_path / "bin" / NAME)
    assert find_sanitizer(environment | {"CUDA_HOME": str(tmp_path / "home")}, toolkits) == first


def test_without_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def absent() -> Path:
        raise SanitizerNotFoundError("install it")

    monkeypatch.setattr(command, "find_sanitizer", absent)
    assert command.main([]) == 2
    assert "install it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("log", "script", "alone", "status"),
    [
        (CLEAN, "exit 0", "true", 0),
        (MEMCHECK, f"exit {ERRORS_FOUND}", "true", 1),
        (INITCHECK.replace("combine", "other"), f"exit {ERRORS_FOUND}", "true", 1),  # memcheck: all are to look at
        (CLEAN, "exit 3", "true", 2),
        (CLEAN, "sleep 60", "true", 2),
        (CLEAN, "exit 0", "false", 2),
    ],
)
def test_the_whole_command(
    log: str, script: str, alone: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With a program in place of the sanitizer that writes a log and runs nothing."""
    (tmp_path / "told").write_text(log)
    find_log = 'while [ "$1" != --log-file ]; do shift; done; cp "$(dirname "$0")/told" "$2"'
    monkeypatch.setattr(command, "find_sanitizer", lambda: program(tmp_path / NAME, f"{find_log} || exit 9\n{script}"))
    monkeypatch.setattr(command, "_version", lambda _: "Version 1")
    original = command.command_of

    def shortened(run: SanitizerRun, **arguments: object) -> list[str]:
        return [alone] if run.tool == ALONE else original(run, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(command, "command_of", shortened)
    out = tmp_path / "out"
    arguments = ["--tools", "memcheck", "--scenarios", "decode", "tables", "--limit", "2", "--out", str(out)]
    assert command.main(arguments) == status
    result = json.loads((out / "sanitize.json").read_text())
    assert result["exit_status"] == status
    assert len(result["runs"]) == 5, "two alone, two one by one, one captured"
    assert max(run["seconds"] for run in result["runs"]) < 40, "what takes too long is ended"
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == result
    assert "| memcheck | decode | one by one |" in printed
    if log == MEMCHECK:
        assert "2 x error: Invalid __global__ read of size 4 bytes in decode_kernel triton_decode.py:343" in printed
    if alone == "false":
        assert {run["status"] for run in result["runs"]} == {"failed", "not run"}


def test_termination_ends_what_it_started(tmp_path: Path) -> None:
    """A sanitizer that outlives its command would go on using the GPU."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.sanitize import command\n"
        "command.command_of = lambda *_, log, **__: ['sh', '-c', f'echo $$ > {log}; exec sleep 60']\n"
        f"command.main(['--device', 'cpu', '--scenarios', 'tables', '--out', {str(tmp_path)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    log = tmp_path / "alone-tables.log"
    try:
        wait_until(lambda: log.is_file() and log.read_text().strip() != "")
        child = int(log.read_text())
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    wait_until(lambda: not alive(child))


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_kernels_can_be_launched_in_turn() -> None:
    code = (
        "import torch; from benchmarks.sanitize import scenarios; from hf_async_batching.linear import skinny\n"
        "scenarios._launch_in_turn(); assert not skinny.supports_pdl(torch.device('cuda', 0))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and that its parent has not looked at does not."""
    status = Path(f"/proc/{process}/stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("tables", "drafts") else pytest.param(name, marks=pytest.mark.slow)
        for name in reversed(SCENARIOS)
    ],
)
def test_scenarios_run_on_a_cpu(name: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert command.main(["--device", "cpu", "--scenarios", name, "--out", str(tmp_path)]) == 0, "".join(
        file.read_text() for file in tmp_path.glob("*.txt")
    )
