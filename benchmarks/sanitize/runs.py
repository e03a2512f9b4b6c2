"""The processes of a run: which tool watches which scenario, and how each process is started and judged."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.sanitize.kernel_names import GENERATED, is_ours
from benchmarks.sanitize.sanitizer_log import Report, SanitizerLog, read_log
from benchmarks.sanitize.scenarios import ONE_BY_ONE, SCENARIOS, WITHOUT_PDL

ALONE = "alone"
"""Stands for no tool: the scenario runs alone, which also fills the caches of the compilers."""
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
DEFAULT_TOOLS = TOOLS[:3]
ERRORS_FOUND = 86
"""Exit status of a process in which a tool found something."""

# This setting of the allocator alone makes memcheck report writes that are in bounds.
_UNSET = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", ONE_BY_ONE, WITHOUT_PDL)
_FIRST_PORT, _PORTS = 49152, 16
_TOOL_OPTIONS = {
    # Ending only the kernel keeps the context alive, so that the next error is found, too.
    "memcheck": ("--destroy-on-device-error", "kernel", "--report-api-errors", "no"),
}


class SanitizerRun(NamedTuple):
    """One process.

    Attributes:
        tool: One of `TOOLS`, or `ALONE`.
        scenario: One of `SCENARIOS`.
        one_by_one: Whether each tensor has its own allocation and no step is captured.
    """

    tool: str
    scenario: str
    one_by_one: bool = False

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.tool}-{self.scenario}{'-one-by-one' if self.one_by_one else ''}"


@dataclass(frozen=True, slots=True)
class SanitizerFinding:
    """Reports of one kind in one kernel."""

    kernel: str
    kind: str
    severity: str
    count: int
    place: str


@dataclass(slots=True)
class SanitizerOutcome:
    """The outcome of a process.

    Attributes:
        run: The process.
        status: "clean", "errors", "failed", "too long", or "not run".
        seconds: Time of the process.
        ours: Findings in kernels that are ours to fix.
        others: Findings in other libraries' kernels.
        copies: Findings outside of kernels: copies of memory that was not written.
        note: Why the process failed, or what the tool did not see.
    """

    run: SanitizerRun
    status: str
    seconds: float = 0.0
    ours: list[SanitizerFinding] = field(default_factory=list)
    others: list[SanitizerFinding] = field(default_factory=list)
    copies: list[SanitizerFinding] = field(default_factory=list)
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the outcome for the file of results."""
        found = {
            name: [
                {slot: getattr(finding, slot) for slot in SanitizerFinding.__slots__}
                for finding in getattr(self, name)
            ]
            for name in ("ours", "others", "copies")
        }
        return {
            **self.run._asdict(),
            "status": self.status,
            "seconds": round(self.seconds, 1),
            "note": self.note,
            **found,
        }


def plan_runs(tools: Sequence[str], scenarios: Sequence[str], *, all_races: bool) -> list[SanitizerRun]:
    """List the processes with a tool, the longest ones first.

    Races within a block do not depend on how a kernel is launched, so racecheck and synccheck watch each kernel once;
    with `all_races` they watch all scenarios.
    """
    runs: list[SanitizerRun] = []
    for tool in sorted(tools, key=("racecheck", "memcheck", "initcheck", "synccheck").index):
        for name in sorted(scenarios, key=list(SCENARIOS).index):
            scenario = SCENARIOS[name]
            if tool in ("racecheck", "synccheck"):
                runs += [SanitizerRun(tool, name)] if scenario.races or all_races else []
                continue
            runs.append(SanitizerRun(tool, name, one_by_one=True))
            if tool == "memcheck" and scenario.captured:
                runs.append(SanitizerRun(tool, name))
    return runs


def command_of(
    run: SanitizerRun,
    *,
    sanitizer: Path | None,
    log: Path,
    device: str,
    slot: int,
    names: Collection[str],
    limit: float,
) -> list[str]:
    """Return the command line of a process.

    Args:
        run: The process.
        sanitizer: The program compute-sanitizer; not needed without a tool.
        log: The file to which the tool writes.
        device: The device of the scenario.
        slot: A number that is unique among the processes that run at the same time.
        names: Kernels that racecheck watches, beside generated ones; empty for all.
        limit: Seconds after which the process is ended. Shortly before, it writes all stacks to its output.
    """
    scenario = [
        sys.executable, "-m", "benchmarks.sanitize", "--scenario", run.scenario, "--device", device,
        "--limit", f"{limit:g}",
    ]  # fmt: skip
    if run.tool == ALONE:
        return scenario
    options = [*_TOOL_OPTIONS.get(run.tool, ())]
    if run.one_by_one and run.tool == "memcheck":
        options += ["--padding", "512"]
    if run.tool == "racecheck" and names:
        # initcheck must watch all kernels: memory that an unwatched kernel has written would count as unwritten.
        options += [word for name in sorted(names) for word in ("--kernel-name", f"kne={name}")]
        options += ["--kernel-name", f"kns={GENERATED}"]
    return [
        str(sanitizer), "--tool", run.tool, "--target-processes", "all", "--error-exitcode", str(ERRORS_FOUND),
        "--print-limit", "1000", "--show-backtrace", "device", "--port", str(_FIRST_PORT + _PORTS * slot),
        "--log-file", str(log), *options, *scenario,
    ]  # fmt: skip


def environment_of(
    run: SanitizerRun, base: Mapping[str, str], *, device: str, settings: Path, pdl: bool = True
) -> dict[str, str]:
    """Return the environment variables of a process.

    Args:
        run: The process.
        base: The variables of this process.
        device: The device of the scenario.
        settings: An empty folder, used instead of the folder with measured settings of kernels.
        pdl: Whether kernels may be launched before the previous kernel has ended.
    """
    environment = {name: value for name, value in base.items() if name not in _UNSET}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_ASYNC_BATCHING_CACHE": str(settings),
        # The tool would watch compilers in their own processes, too.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if run.one_by_one:
        environment[ONE_BY_ONE] = "1"
    if not pdl:
        environment[WITHOUT_PDL] = "1"
    if device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": base.get("OMP_NUM_THREADS", "1")}
    return environment


_running: set[subprocess.Popen[bytes]] = set()


def end_all() -> None:
    """End every running process. A sanitizer that outlives its command would continue to use the GPU."""
    for process in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def execute(
    run: SanitizerRun,
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    limit: float,
    names: frozenset[str],
) -> SanitizerOutcome:
    """Run a process to its end, or for `limit` seconds, and judge it. Its output and log stay in `folder`."""
    output, log = folder / f"{run.name}.txt", folder / f"{run.name}.log"
    log.unlink(missing_ok=True)
    began = time.perf_counter()
    with output.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
        )
        _running.add(process)
        code: int | None = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:
                # The tool and its program have their own session, which is ended as a whole.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            _running.discard(process)
    seconds = time.perf_counter() - began
    written = read_log(log.read_text(errors="replace")) if log.is_file() else None
    outcome = judge(run, code, written, names)
    outcome.seconds = seconds
    if outcome.status in ("failed", "too long"):
        last = [line for line in output.read_text(errors="replace").splitlines() if line.strip()][-1:]
        outcome.note = "; ".join(part for part in (outcome.note, *last) if part)
    return outcome


def judge(run: SanitizerRun, code: int | None, log: SanitizerLog | None, names: frozenset[str]) -> SanitizerOutcome:
    """Judge a process.

    Kernels of torch and its libraries write outside of their memory only if they get wrong arguments, so all errors of
    memcheck are ours to fix. racecheck and initcheck are known to report false errors in those kernels.

    Args:
        run: The process.
        code: The exit status; None if the process was ended at its limit.
        log: The tool's log; None without a log.
        names: The package's Triton functions.
    """
    outcome = SanitizerOutcome(run, "clean")
    if log is not None:
        kinds: dict[str, list[Report]] = {"ours": [], "others": [], "copies": []}
        for report in log.reports:
            ours = run.tool == "memcheck" or any(is_ours(frame.function, names) for frame in report.frames)
            kinds["copies" if not report.frames else "ours" if ours else "others"].append(report)
        outcome.ours, outcome.others, outcome.copies = map(_grouped, kinds.values())
        notes = dict.fromkeys(log.troubles)
        if log.not_printed:
            notes[f"{log.not_printed} more were not printed"] = None
        outcome.note = "; ".join(notes)
    # A tool that wrote no summary, or that left a kernel out, did not run to its end.
    complete = run.tool == ALONE or (
        log is not None
        and log.summary is not None
        and not any(trouble.startswith("Internal Sanitizer") for trouble in log.troubles)
    )
    if outcome.ours:
        outcome.status = "errors"
    elif code is None:
        outcome.status = "too long"
    elif code not in ((0,) if run.tool == ALONE else (0, ERRORS_FOUND)) or not complete:
        outcome.status = "failed"
    return outcome


def _grouped(reports: Sequence[Report]) -> list[SanitizerFinding]:
    counts: dict[tuple[str, str, str], int] = {}
    places: dict[tuple[str, str, str], str] = {}
    for report in reports:
        key = (report.kernel, report.kind, report.severity)
        counts[key] = counts.get(key, 0) + report.hazards
        places.setdefault(key, report.place)
    ordered = sorted(counts, key=lambda key: -counts[key])
    return [SanitizerFinding(*key, counts[key], places[key]) for key in ordered]
