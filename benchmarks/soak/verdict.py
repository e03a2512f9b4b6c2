"""The verdict on a soak."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.soak.subjects import Subject
from benchmarks.soak.tally import Tally
from benchmarks.soak.watch import Growth, Held, growth, held, held_objects, live_objects

_QUIET_SECONDS = 60.0
# In another batch, rounding moves the edge of a filter at most once in this many drawn tokens.
_DRAWN_OTHERWISE = 1 / 20_000
# Threads that other libraries keep until the process ends.
_OTHERS = {"tqdm_monitor"}


@dataclass(frozen=True, slots=True)
class SoakVerdict:
    """The problems of a soak, and the course of its memory.

    Attributes:
        problems: One sentence for each problem; empty if all is well.
        memory: Course of the memory after the warm-up.
    """

    problems: tuple[str, ...]
    memory: tuple[Growth, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        lines = [f"memory: {found}" for found in self.memory]
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        return "\n".join([*lines, "verdict: " + ("all is well" if self.holds else f"{len(self.problems)} problems")])


def judge(
    subjects: Sequence[Subject],
    tally: Tally,
    samples: list[Held],
    stuck: list[str],
    before: Held,
    threads_before: set[threading.Thread],
    objects_before: frozenset[int],
    bound: float,
) -> SoakVerdict:
    """Wait until nothing runs, check what is held, close the managers, and check again.

    Args:
        subjects: The models; their clients have ended.
        tally: Outcomes of the requests.
        samples: Samples of memory, in the order of time.
        stuck: Threads that did not end.
        before: What was held before the first request.
        threads_before: The same for threads.
        objects_before: The same for requests and handles; see `known_objects`.
        bound: MiB per minute that memory may grow.
    """
    memory = growth(samples, bound)
    problems = [f"{found} is not flat" for found in memory if not found.flat]
    problems += [f"{name} did not end" for name in stuck]
    problems += [f"wrong: {detail}" for detail in tally.wrong]
    problems += [f"failed: {detail}" for detail in tally.failed]
    if not tally.notes["compared"]:
        problems.append("nothing was compared")
    otherwise, drawn = tally.notes["drawn otherwise"], tally.notes["drawn twice"]
    if otherwise > 1 + _DRAWN_OTHERWISE * drawn:
        problems.append(f"{otherwise} draws of {drawn} tokens differed the second time")
    problems += _rows_and_pages(subjects)
    for subject in subjects:
        subject.manager.close()
    problems += _left_behind(before, threads_before, objects_before)
    return SoakVerdict(tuple(problems), tuple(memory))


def _rows_and_pages(subjects: Sequence[Subject]) -> list[str]:
    """List the rows and pages that are held without a request."""
    deadline = time.perf_counter() + _QUIET_SECONDS
    problems: list[str] = []
    for subject in subjects:
        while True:
            stats = subject.manager.stats()
            busy = {
                name: getattr(stats, name)
                for name in ("running", "waiting", "rows_in_use", "pages_in_use")
                if getattr(stats, name)
            }
            if not busy:
                break
            if time.perf_counter() > deadline:
                problems.append(f"{subject.name} holds {busy} with no request")
                break
            time.sleep(0.02)
    return problems


def _left_behind(before: Held, threads_before: set[threading.Thread], objects_before: frozenset[int]) -> list[str]:
    """List the threads, descriptors, requests and handles that remain after the last engine."""
    deadline = time.perf_counter() + 10.0
    while True:
        threads = [one.name for one in set(threading.enumerate()) - threads_before if one.name not in _OTHERS]
        objects = live_objects(objects_before)
        after = held()
        descriptors = after.descriptors - before.descriptors
        if not (threads or objects or descriptors > 0) or time.perf_counter() > deadline:
            break
        time.sleep(0.2)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    print(f"after: {after}")
    problems = []
    if threads:
        problems.append(f"threads are left: {', '.join(sorted(threads))}")
    if objects:
        problems.append(f"objects are left: {held_objects(objects_before) or objects}")
    if descriptors > 0:
        problems.append(f"{descriptors} descriptors more than before are open")
    return problems
