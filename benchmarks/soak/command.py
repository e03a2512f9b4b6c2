"""Runs clients in threads, changes weights and engines meanwhile, reports each half minute, and gives a verdict.

python -m benchmarks.soak --minutes 15
python -m benchmarks.soak --minutes 15 --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import logging
import os
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import transformers

from benchmarks.soak import call_loads, faulty_loads, loads
from benchmarks.soak.job import SoakJob
from benchmarks.soak.subjects import FAMILIES, IDLE, Subject, make_tokenizer, missing
from benchmarks.soak.tally import Tally
from benchmarks.soak.verdict import SoakVerdict, judge
from benchmarks.soak.watch import Held, held, known_objects, return_freed_memory

Load = Callable[[SoakJob], None]

# How often each load is chosen, relative to the others.
LOADS: dict[Load, int] = {
    loads.greedy: 8,
    loads.drawing: 6,
    loads.processed: 8,
    loads.outputs: 2,
    loads.prompt_lookup: 3,
    loads.stop_strings: 2,
    loads.criteria: 2,
    loads.max_time: 1,
    loads.processors: 2,
    loads.prefix_allowed: 1,
    loads.embeddings: 2,
    loads.streaming: 3,
    loads.coroutines: 2,
    loads.cancelled: 3,
    loads.forgotten: 1,
    call_loads.padded_batch: 4,
    call_loads.drawn_batch: 2,
    call_loads.streamer: 1,
    call_loads.batch_processors: 2,
    call_loads.dataset: 1,
    faulty_loads.refused: 4,
    faulty_loads.faulty_processor: 2,
    faulty_loads.faulty_callback: 1,
}

# For each pair of a thread's handle and a stream, torch keeps a workspace of cuBLAS until the process ends. On Hopper
# it has 32 MiB or more. A soak makes dozens of such pairs, and small workspaces make our own leaks visible.
_SMALL_WORKSPACES = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "128"}

_JOIN_SECONDS = 240.0
_TRIM_EVERY = 5  # samples
_TURN_SECONDS, _AT_RANDOM = 4.0, 0.2


class Client(threading.Thread):
    """A thread that runs one load after the other until it is told to stop.

    Args:
        number: Number of the client; seeds its choices.
        subjects: Models to choose from.
        chosen: Loads with their weights.
        tally: Counts the outcomes.
        stop: Set at the end.
        arguments: Arguments of the command line.
    """

    def __init__(
        self,
        number: int,
        subjects: Sequence[Subject],
        chosen: dict[Load, int],
        tally: Tally,
        stop: threading.Event,
        arguments: argparse.Namespace,
    ) -> None:
        super().__init__(name=f"soak client {number}", daemon=True)
        self._subjects = subjects
        self._loads = chosen
        self._tally = tally
        self._stop_event = stop
        self._checks = arguments.checks
        self._rng = random.Random(f"{arguments.seed} {number}")
        self._tokenizer = make_tokenizer()
        self.doing = ""

    def run(self) -> None:
        """Run loads until told to stop."""
        while not self._stop_event.is_set():
            awake = [subject for subject in self._subjects if subject.awake]
            if not awake:
                time.sleep(0.05)
                continue
            job = SoakJob(self._subject(awake), self._rng, self._tally, self._checks, self._tokenizer)
            (load,) = self._rng.choices(list(self._loads), list(self._loads.values()))
            job.load, self.doing = load.__name__, f"{load.__name__} on {job.subject.name}"
            try:
                load(job)
            except Exception as error:
                outcome, tokens, detail = loads.outcome_of(error)
                # No engine is closed while one of its requests is compared.
                self._tally.add(job.load, outcome, tokens, f"{job.subject.name}: {detail}")
        self.doing = ""

    def _subject(self, awake: Sequence[Subject]) -> Subject:
        """Choose a model: mostly the one that all clients use for some seconds, so that its rows and pages run out."""
        if self._rng.random() < _AT_RANDOM:
            return self._rng.choice(awake)
        return awake[int(time.perf_counter() / _TURN_SECONDS) % len(awake)]


def change(
    subjects: Sequence[Subject], rng: random.Random, stop: threading.Event, tally: Tally, seconds: float
) -> None:
    """Change weights and adapters, close managers, and let engines stop by themselves, until told to stop."""
    while not stop.wait(rng.uniform(0.5, 1.5) * seconds):
        subject = rng.choice(list(subjects))
        ways: list[tuple[str, Callable[[], None]]] = [
            ("weights changed", subject.step_weights),
            ("weights changed", subject.step_weights),
            ("managers closed", subject.new_manager),
            ("rests", partial(subject.rest, 3 * IDLE)),
        ]
        if subject.name == "adapters":
            ways = [("adapters switched", subject.switch_adapter), *ways[2:]]
        name, way = rng.choice(ways)
        way()
        tally.note(name)


def _report(began: float, tally: Tally, subjects: Sequence[Subject], now: Held, tokens: int, seconds: float) -> str:
    found = tally.outcomes()
    stats = [subject.manager.stats() for subject in subjects]
    return (
        f"{(now.at - began) / 60:5.1f} min: {now}; rows {sum(one.rows_in_use for one in stats)}, pages "
        f"{sum(one.pages_in_use for one in stats)} of {sum(one.pages_total for one in stats)}, preempted "
        f"{sum(one.preemptions for one in stats)}; {found['done']} done, {found['refused']} refused, "
        f"{found['cancelled']} cancelled, {found['closed']} closed, {found['failed']} failed, {found['wrong']} wrong, "
        f"{tally.notes['compared']} compared; {(tally.tokens - tokens) / max(seconds, 1e-9):.0f} tokens/s"
    )


def run(arguments: argparse.Namespace) -> SoakVerdict:
    """Run the soak, and print reports meanwhile."""
    if arguments.device != "cpu":
        for name, value in _SMALL_WORKSPACES.items():
            os.environ.setdefault(name, value)
    chosen, subjects = _what(arguments)
    tally, stop = Tally(), threading.Event()
    for subject in subjects:  # loads libraries and starts thread pools
        subject.manager.warmup()
        subject.manager.close()
        subject.new_manager()
    gc.collect()
    before = held()
    threads_before, objects_before = set(threading.enumerate()), known_objects()
    print(f"before: {before}", flush=True)
    clients = [Client(number, subjects, chosen, tally, stop, arguments) for number in range(arguments.clients)]
    changer = threading.Thread(
        target=change,
        args=(subjects, random.Random(arguments.seed), stop, tally, arguments.change_every),
        name="soak changes",
        daemon=True,
    )
    began = shown = time.perf_counter()
    for thread in (*clients, changer):
        thread.start()
    samples: list[Held] = []
    tokens = 0
    while (now := time.perf_counter()) < began + 60 * arguments.minutes:
        time.sleep(min(1.0, began + 60 * arguments.minutes - now))
        if len(samples) % _TRIM_EVERY == 0:
            return_freed_memory()
        samples.append(held())
        if samples[-1].at >= shown + arguments.every:
            print(_report(began, tally, subjects, samples[-1], tokens, samples[-1].at - shown), flush=True)
            tokens, shown = tally.tokens, samples[-1].at
    stop.set()
    stuck = _joined([*clients, changer])
    rate = tally.tokens / (time.perf_counter() - began)
    verdict = judge(subjects, tally, samples, stuck, before, threads_before, objects_before, arguments.flat)
    for load, found in tally.by_load().items():
        print(f"  {load}: " + ", ".join(f"{count} {outcome}" for outcome, count in found.most_common()))
    print("  " + ", ".join(f"{count} {what}" for what, count in tally.notes.most_common()))
    print(f"  {tally.tokens} tokens, {rate:.0f} a second")
    print(verdict)
    return verdict


def _what(arguments: argparse.Namespace) -> tuple[dict[Load, int], list[Subject]]:
    """Return the loads and models for this environment, and print what is left out."""
    chosen = dict(LOADS)
    if (why := call_loads.dataset_missing()) is not None:
        print(f"left out: datasets, {why}")
        del chosen[call_loads.dataset]
    if not hasattr(transformers.GenerationConfig(), "top_h"):
        print("left out: top_h, which this release of transformers does not have")
    subjects = []
    for name in arguments.families.split(","):
        if (why := missing(name)) is not None:
            print(f"left out: {name}, {why}")
            continue
        device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
        subjects.append(Subject(name, device, dtype, compiled=arguments.compile))
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {arguments.device}, {arguments.dtype}, "
        f"seed {arguments.seed}, {arguments.clients} clients, {', '.join(subject.name for subject in subjects)}"
    )
    return chosen, subjects


def _joined(threads: Sequence[threading.Thread]) -> list[str]:
    """Wait for the threads; return the names of those that did not end."""
    deadline = time.perf_counter() + _JOIN_SECONDS
    for thread in threads:
        thread.join(max(0.1, deadline - time.perf_counter()))
    stuck = [f"{thread.name} ({getattr(thread, 'doing', '')})" for thread in threads if thread.is_alive()]
    if stuck:
        faulthandler.dump_traceback(all_threads=True)
    return stuck


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="length of the soak (default: 15)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="dtype of the models; float32 is compared exactly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", default=",".join(FAMILIES), help="families to serve (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=12, help="threads with requests (default: 12)")
    parser.add_argument("--checks", type=float, default=0.2, help="share of compared requests (default: 0.2)")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between reports (default: 30)")
    parser.add_argument("--change-every", type=float, default=2.0, help="seconds between changes (default: 2)")
    parser.add_argument("--flat", type=float, default=2.0, help="MiB per minute that memory may grow (default: 2)")
    parser.add_argument("--compile", action="store_true", help="let engines compile their layers")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0 if all is well."""
    arguments = _parser().parse_args(argv)
    unknown = set(arguments.families.split(",")) - FAMILIES.keys()
    if unknown:
        print(f"--families: {', '.join(sorted(unknown))} is none of {', '.join(FAMILIES)}", file=sys.stderr)
        return 2
    if arguments.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        return 0 if run(arguments).holds else 1


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Make libraries log less meanwhile, because many requests are bad on purpose."""
    levels = {"hf_async_batching": logging.CRITICAL, "transformers": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
