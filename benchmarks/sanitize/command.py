"""Runs every tool over every scenario, prints a table, writes one JSON file, and returns an exit status.

python -m benchmarks.sanitize --out results
python -m benchmarks.sanitize --tools memcheck --scenarios decode mixed
python -m benchmarks.sanitize --device cpu          # the scenarios alone; kernels in Triton's interpreter

Each scenario first runs alone. Then memcheck and initcheck watch it with each tensor in its own allocation and without
captured steps. memcheck also watches it with captured steps. racecheck watches each of our kernels once.
Exit status 1: an error that is ours to fix. 2: no error, but a process could not run to its end.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from benchmarks.sanitize.finder import SanitizerNotFoundError, find_sanitizer
from benchmarks.sanitize.kernel_names import package_kernels
from benchmarks.sanitize.runs import (
    ALONE,
    DEFAULT_TOOLS,
    TOOLS,
    SanitizerOutcome,
    SanitizerRun,
    command_of,
    end_all,
    environment_of,
    execute,
    plan_runs,
)
from benchmarks.sanitize.scenarios import SCENARIOS, run_scenario


def main(arguments: Sequence[str] | None = None) -> int:
    about = "\n".join(f"  {name:10s} {scenario.about}" for name, scenario in SCENARIOS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nscenarios:\n{about}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(DEFAULT_TOOLS))
    parser.add_argument(
        "--scenarios",
        nargs="+",
        choices=SCENARIOS,
        help="scenarios to run (all; racecheck then skips those without kernels of their own)",
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--side-by-side", type=int, metavar="N", help="processes at a time (6; on a CPU 1)")
    parser.add_argument("--limit", type=float, default=240.0, help="time limit of a process in seconds (240)")
    parser.add_argument("--all-kernels", action="store_true", help="racecheck checks libraries' kernels, too")
    parser.add_argument("--without-pdl", action="store_true", help="launch no kernel before the last one has ended")
    parser.add_argument("--out", type=Path, help="folder for sanitize.json and the logs; without it, logs are deleted")
    parser.add_argument("--scenario", choices=SCENARIOS, help="run this one in this process, without a tool")
    given = parser.parse_args(arguments)
    if given.scenario is not None:
        import torch

        faulthandler.dump_traceback_later(0.9 * given.limit)
        run_scenario(given.scenario, torch.device(given.device))
        faulthandler.cancel_dump_traceback_later()
        return 0
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_termination)
    sanitizer: Path | None = None
    if given.device != "cpu":
        try:
            sanitizer = find_sanitizer()
        except SanitizerNotFoundError as error:
            print(error, file=sys.stderr)
            return 2
    with TemporaryDirectory(prefix="sanitize-") as scratch:
        folder = given.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        outcomes = _run_all(given, sanitizer, folder, Path(scratch))
        summary = {
            "device": given.device,
            "sanitizer": None if sanitizer is None else _version(sanitizer),
            "seconds": round(time.perf_counter() - began, 1),
            "runs": [outcome.as_json() for outcome in outcomes],
        }
        _print(outcomes)
        status = verdict(outcomes)
        text = json.dumps(summary | {"exit_status": status})
        print(text)
        (folder / "sanitize.json").write_text(text)
    return status


def _on_termination(number: int, _: FrameType | None) -> None:
    end_all()
    os._exit(128 + number)


def verdict(outcomes: Sequence[SanitizerOutcome]) -> int:
    """Return the exit status: 1 for an error of ours, 2 if a process did not run to its end, and 0 otherwise."""
    if any(outcome.ours for outcome in outcomes):
        return 1
    return 2 if any(outcome.status not in ("clean", "errors") for outcome in outcomes) else 0


def _run_all(
    given: argparse.Namespace, sanitizer: Path | None, folder: Path, settings: Path
) -> list[SanitizerOutcome]:
    names = package_kernels()
    kernels = frozenset() if given.all_kernels else names
    count = given.side_by_side or (1 if given.device == "cpu" else 6)
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(count):
        slots.put(slot)

    def one(run: SanitizerRun) -> SanitizerOutcome:
        slot = slots.get()
        try:
            log = folder / f"{run.name}.log"
            command = command_of(
                run, sanitizer=sanitizer, log=log, device=given.device, slot=slot, names=kernels, limit=given.limit
            )
            environment = environment_of(
                run, os.environ, device=given.device, settings=settings, pdl=not given.without_pdl
            )
            outcome = execute(run, command, environment, folder, given.limit, names)
        finally:
            slots.put(slot)
        print(f"{outcome.seconds:6.1f} s  {run.name}: {outcome.status} {outcome.note}"[:300].rstrip(), flush=True)
        return outcome

    scenarios = given.scenarios or list(SCENARIOS)
    with ThreadPoolExecutor(count) as pool:
        alone = list(pool.map(one, [SanitizerRun(ALONE, name) for name in scenarios]))
        if sanitizer is None:
            return alone
        fails = {outcome.run.scenario for outcome in alone if outcome.status != "clean"}
        runs = plan_runs(given.tools, scenarios, all_races=given.scenarios is not None)
        watched = pool.map(one, [run for run in runs if run.scenario not in fails])
        left_out = [SanitizerOutcome(run, "not run", note="fails alone") for run in runs if run.scenario in fails]
        return [*alone, *watched, *left_out]


def _version(sanitizer: Path) -> str:
    said = subprocess.run([str(sanitizer), "--version"], capture_output=True, text=True, check=False).stdout
    return next((line for line in said.splitlines() if line.startswith("Version")), "unknown")


def _print(outcomes: Sequence[SanitizerOutcome]) -> None:
    print("\n| tool | scenario | memory | status | seconds | ours | others | copies |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for outcome in outcomes:
        run = outcome.run
        counts = " | ".join(
            str(sum(finding.count for finding in found)) for found in (outcome.ours, outcome.others, outcome.copies)
        )
        memory = "one by one" if run.one_by_one else "cached"
        print(f"| {run.tool} | {run.scenario} | {memory} | {outcome.status} | {outcome.seconds:.0f} | {counts} |")
    for name, title in (("ours", "to look at"), ("others", "in libraries"), ("copies", "outside of kernels")):
        lines = [
            f"  {o.run.name}: {f.count} x {f.severity}: {f.kind} in {f.kernel[:100] or '-'} {f.place}".rstrip()
            for o in outcomes
            for f in getattr(o, name)
        ]
        if lines:
            print(f"\n{title}:", *lines, sep="\n")
    print()


if __name__ == "__main__":
    sys.exit(main())
