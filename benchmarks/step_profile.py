"""Shows where the steps of a workload spend their time, by kind of step, and by kernel for a few steps.

python -m benchmarks.step_profile mix --shape llama-3.1-8b --admission fcfs longest_first --kernels 100 700
python -m benchmarks.step_profile mix --shape tiny --device cpu --rows 6 --prompt 40 --new 20 --dtype float32

The workload is served twice for each admission order. The second pass counts, and its requests share no prefix with
those of the first. A step's time is from the end of the step before to its own end, so that gaps count. Its floor is
the bytes that it must read, over the copy bandwidth measured in the same process. --kernels names steps: in a third
pass, torch's profiler watches ten steps from each of them on. A kernel's total time there is from the end of the
kernel before to its own end, because kernels that are launched early wait inside. In "gap", its part, no kernel runs.
"Own" is the kernel's own duration.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

import torch
from torch.profiler import ProfilerActivity

from hf_async_batching.bench.drive import ThroughEngine
from hf_async_batching.bench.machine import look_at
from hf_async_batching.bench.measure import Traffic
from hf_async_batching.bench.shapes import SHAPES, random_model
from hf_async_batching.bench.workloads import WORKLOADS, make_workload
from hf_async_batching.config import Admission, BatchingConfig
from hf_async_batching.core.graph_buckets import PADDED_TOKENS, decode_buckets
from hf_async_batching.core.timeline import StepRecord

WATCHED, MOST_KERNELS = 10, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--admission", nargs="+", choices=get_args(Admission), default=["fcfs"])
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--prompt", type=int)
    parser.add_argument("--new", type=int)
    parser.add_argument("--kernels", type=int, nargs="*", default=[], metavar="STEP")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    model, machine = random_model(arguments.shape, device, getattr(torch, arguments.dtype)), look_at(device)
    sizes = {name: getattr(arguments, name) for name in ("rows", "prompt", "new") if getattr(arguments, name)}
    for admission in arguments.admission:
        work = [make_workload(arguments.workload, model.config.vocab_size, seed=seed, **sizes) for seed in range(3)]
        config = BatchingConfig(
            depth=arguments.depth,
            admission=admission,
            max_rows=len(work[0].first),
            max_sequence_length=work[0].longest,
            timeline_steps=1 << 20,
        )
        driver = ThroughEngine(model, config)
        driver.start(replace(work[0].first[0], request_id="start", max_new_tokens=2))
        driver.warmup()
        driver.serve(work[0])
        served = driver.serve(work[1])
        print(f"\n{arguments.workload}, {arguments.shape}, {admission}: {served.seconds:.2f} s, {machine.card}")
        by_kind(served.records, Traffic.of(driver.assembly), machine.copy_bandwidth)
        if arguments.kernels:
            watch(driver, work[2], sorted(arguments.kernels))
        driver.close()


def kind(step: StepRecord, buckets: Sequence[int]) -> tuple[str, int]:
    """Return the group of a step: decode steps by bucket, others by padded size, and the largest by their tokens."""
    if not step.prompt_tokens:
        return "decode", next(bucket for bucket in buckets if bucket >= step.decode_rows)
    tokens = step.decode_rows + step.prompt_tokens
    return "with prompts", next((size for size in PADDED_TOKENS if tokens < size), tokens)


def by_kind(records: Sequence[StepRecord], traffic: Traffic, bandwidth: float) -> None:
    """Print the steps of each kind, with their time and their floor."""
    kinds: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    buckets = decode_buckets(max([1, *[step.decode_rows for step in records]]))
    for before, after in itertools.pairwise(records):
        floor = traffic.of_steps([after]) / bandwidth
        kinds[kind(after, buckets)].append((after.compute[1] - before.compute[1], floor))
    print(
        "| steps | up to | count | seconds | ms/step | floor ms | MBU % |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for (name, size), spans in sorted(kinds.items()):
        seconds, floor = (sum(column) for column in zip(*spans, strict=True))
        print(
            f"| {name} | {size} | {len(spans)} | {seconds:.2f} | {1e3 * seconds / len(spans):.2f} "
            f"| {1e3 * floor / len(spans):.2f} | {100 * floor / seconds:.1f} |"
        )


@torch.inference_mode()
def watch(driver: ThroughEngine, workload: Any, firsts: Sequence[int]) -> None:
    """Print the kernels of `WATCHED` steps, from each step in `firsts` on."""
    engine = driver.assembly.engine
    for request in workload.first:
        engine.add(request)
    number, cuda = 0, torch.cuda.is_available()
    while engine.has_work:
        if number not in firsts:
            engine.step()
            number += 1
            continue
        first = number
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profile:
            while engine.has_work and number < first + WATCHED:
                engine.step()
                number += 1
            if cuda:
                torch.cuda.synchronize()
        last, count = engine.records[-1], number - first
        print(
            f"\nsteps {first} to {number - 1}: {last.decode_rows} rows, {last.prompt_tokens} prompt tokens in the last"
        )
        if not cuda:
            for event in sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)[:MOST_KERNELS]:
                per_step = event.self_cpu_time_total / count / 1e3
                print(f"{per_step:8.3f} ms/step {event.count / count:7.1f} calls  {event.key[:110]}")
            continue
        spans = [
            Span(event.name, event.time_range.start, event.time_range.end)
            for event in profile.events()
            if event.device_type.name == "CUDA"
        ]
        print("   total      gap      own  launches   (ms a step)")
        for name, share in sorted(by_name(spans).items(), key=lambda item: -item[1].total)[:MOST_KERNELS]:
            total, gap, own = (each / count / 1e3 for each in (share.total, share.gap, share.own))
            print(f"{total:8.3f} {gap:8.3f} {own:8.3f} {share.launches / count:9.1f}   {name[:110]}")


class Span(NamedTuple):
    """A kernel's name, start and end in microseconds."""

    name: str
    start: float
    end: float


@dataclass(slots=True)
class Share:
    """The sums of a kernel's launches in microseconds; see the module's text."""

    total: float = 0.0
    gap: float = 0.0
    own: float = 0.0
    launches: int = 0


def by_name(spans: Iterable[Span]) -> dict[str, Share]:
    """Sum up each kernel's share of the time between the first start and the last end."""
    shares: dict[str, Share] = defaultdict(Share)
    before: float | None = None
    for span in sorted(spans, key=lambda span: span.end):
        share = shares[span.name]
        if before is None:
            before = span.start
        share.total += span.end - before
        share.gap += max(0.0, span.start - before)
        share.own += span.end - span.start
        share.launches += 1
        before = span.end
    return dict(shares)


if __name__ == "__main__":
    main()
