"""Measures sampling in microseconds per step, and checks that the kernels draw the same tokens as the torch code.

    python -m benchmarks.sampling_speed [--rows 256] [--vocab 151936] [--out results/sampling.json]

Logits are random. The rows of a timed step differ only in their seeds; the rows of the check differ in all parameters.
A time is the median of replayed CUDA graphs, as in served steps. Without a GPU it is the median of plain calls (with
TRITON_INTERPRET=1, a dry run).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.plan import Features, NewRow, Plan
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.runner import staging
from hf_async_batching.sampling.metadata import SamplingMetadata
from hf_async_batching.sampling.sampler import Sampler
from hf_async_batching.sampling.token_history import TokenHistory
from hf_async_batching.scheduler.sequence import Sequence
from hf_async_batching.scheduler.step_features import features_of

USUAL: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1}
CASES: dict[str, dict[str, Any] | None] = {
    "greedy": None,
    "greedy, repetition penalty 1.1": {"repetition_penalty": 1.1},
    "temperature 0.8": {"temperature": 0.8},
    "top-k 50": {"top_k": 50},
    "top-k 50, top-p 0.9, temperature 0.8, repetition penalty 1.1": USUAL,
    "top-k 500, top-p 0.9": {"top_k": 500, "top_p": 0.9},
    "top-p 0.9": {"top_p": 0.9},
    "top-p 0.1": {"top_p": 0.1},
    "min-p 0.05": {"min_p": 0.05},
}
# A flat distribution as from random weights, one like a language model's, and one with a nearly certain token.
SPREADS = {"flat": 0.5, "usual": 3.0, "peaked": 8.0}


def request(fields: dict[str, Any] | None, seed: int) -> Request:
    fields = dict(fields or {})
    logits = LogitsParams(repetition_penalty=fields.pop("repetition_penalty", 1.0))
    sampling = SamplingParams(do_sample=True, seed=seed, **fields) if fields else SamplingParams()
    return Request(str(seed), (1,), 9, sampling=sampling, logits=logits)


def rows_of(requests: list[Request], vocab: int, device: torch.device) -> tuple[SamplingMetadata, Features]:
    """Make rows at random positions, each with 500 tokens in its history."""
    count = len(requests)
    plan = Plan(0, (), new_rows=tuple(NewRow(i + 1, one) for i, one in enumerate(requests)))
    staged = np.zeros(100 * count, np.int32)
    sections = staging.encode(plan, staged, bucket=0, send_decode_rows=False, tile_size=1)
    params = torch.from_numpy(staged[: sections.total]).view(count, -1)[:, 1:].contiguous().to(device)
    memory = TokenHistory(max_rows=count, max_length=8, vocab_size=vocab, device=device)
    memory.ensure(words=False, seen=True)
    assert memory.seen is not None
    generator = torch.Generator().manual_seed(1)
    occurred = torch.randint(0, vocab, (count + 1, 500), generator=generator).to(device)
    memory.seen.scatter_(1, occurred, torch.ones_like(occurred, dtype=torch.uint8))
    positions = torch.randint(1, 4000, (count,), generator=generator).to(device)
    sequences = [Sequence(one, 0) for one in requests]
    for sequence in sequences:
        sequence.num_computed = 1
    rows = torch.arange(1, count + 1, dtype=torch.int32, device=device)
    return SamplingMetadata(params, positions, rows, memory), features_of(sequences, [])


def mixed(count: int) -> list[Request]:
    rng = random.Random(5)
    requests = []
    for seed in range(count):
        fields = {
            "temperature": rng.uniform(0.3, 2.0),
            "top_k": rng.choice([0, 0, 1, 20, 50, 64]),
            "top_p": rng.choice([1.0, 0.95, 0.5, 0.1]),
            "min_p": rng.choice([0.0, 0.0, 0.05]),
            "repetition_penalty": rng.choice([1.0, 1.1, 0.9]),
        }
        requests.append(request(fields if rng.random() < 0.9 else {"repetition_penalty": 1.1}, seed))
    return requests


def check(logits: torch.Tensor, requests: list[Request], steps: int) -> tuple[int, int]:
    """Compare the kernels' tokens with those of the torch code at `steps` positions; return equal tokens and all."""
    rows, features = rows_of(requests, logits.shape[1], logits.device)
    same = 0
    for step in range(steps):
        rows.positions.add_(1)
        got, _ = Sampler(fused=True)(logits, rows, features)
        want, _ = Sampler(fused=False)(logits, rows, features)
        differ = (got != want).nonzero().flatten().tolist()
        same += len(requests) - len(differ)
        for index in differ[:3]:
            params = requests[index].sampling
            print(f"  step {step} row {index}: {int(got[index])}, torch {int(want[index])}, {params}")
    return same, steps * len(requests)


def microseconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median time of `work`; on a GPU it is a replayed graph."""
    work()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            work()
            times.append(1e6 * (time.perf_counter() - began))
        return statistics.median(times)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--check-rows", type=int, default=256, help="rows of the check of mixed parameters")
    parser.add_argument("--steps", type=int, default=4, help="steps of the check")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--torch", action="store_true", help="also time the torch code")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {arguments.rows} rows of {arguments.vocab} logits in bfloat16")
    generator = torch.Generator(device).manual_seed(0)
    results: dict[str, Any] = {
        "device": name, "torch": torch.__version__, "rows": arguments.rows, "vocab": arguments.vocab,
        "check": {}, "microseconds": {},
    }  # fmt: skip
    logits = {}
    for spread, scale in SPREADS.items():
        size = (max(arguments.rows, arguments.check_rows), arguments.vocab)
        logits[spread] = (scale * torch.randn(size, generator=generator, device=device)).bfloat16()
    right = True
    for spread, made in logits.items():
        for kind, requests in (
            ("mixed", mixed(arguments.check_rows)),
            ("all four", [request(USUAL, seed) for seed in range(arguments.check_rows)]),
            ("temperature", [request({"temperature": 0.8}, seed) for seed in range(arguments.check_rows)]),
        ):
            same, of = check(made[: arguments.check_rows], requests, arguments.steps)
            results["check"][f"{kind}, {spread}"] = [same, of]
            # If two tokens are equal up to the last bits, the draws may differ.
            right = right and same >= of - max(1, of // 500)
            print(f"check, {kind}, {spread}: {same} of {of} tokens are those of the torch code")
    columns = [f"{spread}{way}" for spread in SPREADS for way in (("", ", torch") if arguments.torch else ("",))]
    print(f"\n| us, rows ask for | {' | '.join(columns)} |")
    print("| --- " * (1 + len(columns)) + "|")
    for label, fields in CASES.items():
        times = {}
        for spread, made in logits.items():
            rows, features = rows_of(
                [request(fields, seed) for seed in range(arguments.rows)], arguments.vocab, device
            )
            some = made[: arguments.rows]
            needed = rows if features.sampling or features.penalty else None
            ways = {spread: True, f"{spread}, torch": False} if arguments.torch else {spread: True}
            for way, fused in ways.items():
                work = partial(Sampler(fused=fused), some, needed, features)
                times[way] = microseconds(work, device, arguments.repeats)
        results["microseconds"][label] = times
        print(f"| {label} | {' | '.join(f'{value:.0f}' for value in times.values())} |", flush=True)
    results["right"] = right
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {arguments.out}")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
