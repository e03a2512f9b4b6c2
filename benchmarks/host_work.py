"""Measures the host's work for a decode step, with the real scheduler, pipeline, engine and worker on an idle device.

    python -m benchmarks.host_work

Prints microseconds per step, by part, for steps in which all rows decode, with short and with long sequences. A part
that grows with the length of the sequences is a mistake. The rows' prompts differ in length, so that rows need their
next pages at different steps. `engine` runs without a thread; `worker` adds the thread, its inbox and one handle per
row. CUDA's launch calls are not included, because nothing is launched. A time is the processor time of the engine's
thread: the mean over `--steps` steps, and the best of `--repeats`.
"""

from __future__ import annotations

import argparse
import gc
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from hf_async_batching.core.request import Request
from hf_async_batching.core.step_layout import NO_PADDING, Sections
from hf_async_batching.devices.base import Graph, Kernel, Stream
from hf_async_batching.devices.cpu import CpuDevice
from hf_async_batching.engine.engine import Engine
from hf_async_batching.engine.engine_thread import EngineThread
from hf_async_batching.handle import GenerationHandle
from hf_async_batching.model.forward.step_inputs import StepInputs
from hf_async_batching.runner.model_runner import ModelRunner
from hf_async_batching.runner.pipeline import Pipeline
from hf_async_batching.runner.row_tables import RowTables
from hf_async_batching.scheduler.scheduler import Scheduler

PAGE_SIZE = 16
MAX_BATCH_TOKENS = 2048
EOS = 2  # checked for each token, but never sampled: the device always answers 0
PARTS = ("plan", "launch", "complete", "deliver")


class IdleDevice(CpuDevice):
    """A device that accepts work and does none; every event is complete when it is recorded."""

    supports_graphs = True
    runs_inline = False

    def copy(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
        pass

    def launch(self, stream: Stream, kernel: Kernel) -> None:
        pass

    def capture(self, work: Kernel) -> Graph:  # noqa: ARG002
        raise RuntimeError("nothing is launched here")


def make_engine(rows: int, tokens: int) -> Engine:
    pages_per_row = -(-tokens // PAGE_SIZE)
    device = IdleDevice()
    state = RowTables(max_rows=rows, max_pages_per_row=pages_per_row, device=device.torch_device)
    runner = ModelRunner(_no_forward, state, device, max_rows=rows, largest=NO_PADDING, spread=False, graphs=True)
    limits = Sections.largest(max_rows=rows, max_batch_tokens=MAX_BATCH_TOKENS, num_pages=rows * pages_per_row)
    pipeline = Pipeline(device, state, runner, depth=2, limits=limits, tile_size=64, logit_size=0)
    scheduler = Scheduler(
        num_pages=rows * pages_per_row, page_size=PAGE_SIZE, max_rows=rows, max_batch_tokens=MAX_BATCH_TOKENS
    )
    return Engine(scheduler, pipeline, device, depth=2)


def _no_forward(inputs: StepInputs) -> torch.Tensor:  # noqa: ARG001
    raise AssertionError("the idle device ran a step")


def make_requests(rows: int, length: int, new: int) -> list[Request]:
    prompts = [tuple(range(3, 3 + length + i % PAGE_SIZE)) for i in range(rows)]
    return [Request(str(i), prompt, new, eos_token_ids=(EOS,)) for i, prompt in enumerate(prompts)]


class Clock:
    """Adds up the seconds spent in wrapped methods while `running`."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.running = False

    def watch(self, owner: Any, name: str, part: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any) -> Any:
            started = time.thread_time()
            out = inner(*args)
            if self.running:
                self.spent[part] += time.thread_time() - started
            return out

        setattr(owner, name, timed)

    def watch_engine(self, engine: Engine) -> None:
        self.watch(engine.scheduler, "plan", "plan")
        self.watch(engine.pipeline, "launch", "launch")
        self.watch(engine.pipeline, "collect", "complete")
        self.watch(engine.scheduler, "complete", "complete")


def engine_alone(rows: int, length: int, steps: int) -> dict[str, float]:
    """Return microseconds per step; "other" is the time of `Engine.step` outside of its parts."""
    prefill = -(-rows * (length + PAGE_SIZE) // MAX_BATCH_TOKENS)
    new = steps + 2 * prefill + 8
    engine, clock = make_engine(rows, length + PAGE_SIZE + new), Clock()
    for request in make_requests(rows, length, new):
        engine.add(request)
    while engine.scheduler.num_waiting or not engine.records or engine.records[-1].decode_rows < rows:
        engine.step()
    clock.watch_engine(engine)
    clock.running = True
    started = time.thread_time()
    for _ in range(steps):
        engine.step()
    total = time.thread_time() - started
    assert engine.records[-1].decode_rows == rows
    return _per_step(clock, total, steps)


def worker_and_handles(rows: int, length: int, steps: int) -> dict[str, float]:
    """Return microseconds per step with the worker's thread and a handle per row; callers wait in `result()`."""
    prefill = -(-rows * (length + PAGE_SIZE) // MAX_BATCH_TOKENS)
    new = steps + 2 * prefill + 8
    engine, clock = make_engine(rows, length + PAGE_SIZE + new), Clock()
    total = 0.0

    def marks() -> Iterator[None]:
        """Advance before each step. Time `steps` steps from the first step of all rows on, with delivery."""
        nonlocal total
        while engine.scheduler.num_waiting or not engine.records or engine.records[-1].decode_rows < rows:
            yield
        clock.running, started = True, time.thread_time()
        for _ in range(steps):
            yield
        clock.running, total = False, time.thread_time() - started

    before_step, step = marks(), engine.step

    def marked_step() -> Any:
        next(before_step, None)
        return step()

    engine.step = marked_step  # type: ignore[method-assign]
    clock.watch_engine(engine)
    assembly: Any = SimpleNamespace(engine=engine, forward=SimpleNamespace(device=torch.device("cpu")))
    worker = EngineThread(
        assembly, max_waiting=rows, idle_timeout=None, first_step=threading.Event(), on_stop=lambda _: None
    )
    clock.watch(worker, "_deliver", "deliver")
    handles = [GenerationHandle(str(i), worker.cancel) for i in range(rows)]
    assert worker.put(make_requests(rows, length, new), handles)
    for handle in handles:
        assert len(handle.result().token_ids) == new
    worker.stop()
    return _per_step(clock, total, steps)


def _per_step(clock: Clock, total: float, steps: int) -> dict[str, float]:
    out = {part: 1e6 * spent / steps for part, spent in clock.spent.items()}
    out["total"] = 1e6 * total / steps
    out["other"] = out["total"] - sum(out[part] for part in PARTS)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[32, 256])
    parser.add_argument("--lengths", type=int, nargs="*", default=[64, 4096], help="tokens of the shortest prompt")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=12)
    arguments = parser.parse_args()
    columns = ("plan", "launch", "complete", "deliver", "other", "total")
    print(f"{'µs per step':8s} {'rows':>5s} {'prompt':>6s} " + " ".join(f"{name:>9s}" for name in columns))
    for what, measure in (("engine", engine_alone), ("worker", worker_and_handles)):
        for rows in arguments.rows:
            for length in arguments.lengths:
                runs = []
                for _ in range(arguments.repeats):
                    runs.append(measure(rows, length, arguments.steps))
                    gc.collect()
                best = min(runs, key=lambda run: run["total"])
                figures = " ".join(f"{best[name]:9.1f}" for name in columns)
                print(f"{what:11s} {rows:5d} {length:6d} {figures}", flush=True)


if __name__ == "__main__":
    main()
