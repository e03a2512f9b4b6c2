"""Checks and times each setting of the skinny matrix products on one GPU, beside the vendor's library.

python -m benchmarks.linear_sweep --out sweep.json
python -m benchmarks.linear_sweep --rows 64 128 192 256 264 384 512 2048   # the library's steps

A product is timed in a CUDA graph over more weights than the L2 cache holds, as in a decode step. The library is timed
without a bias, and with a bias of zeros (see `hf_async_batching.linear.library`). Above our kernel's largest number of
rows, only the library is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import linear

from hf_async_batching.bench.machine import copy_bandwidth
from hf_async_batching.devices.shared_memory import shared_memory_limit
from hf_async_batching.linear.engine_linear import MAX_STRIPS
from hf_async_batching.linear.skinny import (
    MAX_ROWS,
    SkinnySetting,
    candidates,
    default_setting,
    skinny_linear,
)

DEVICE = torch.device("cuda")

SHAPES = {
    "llama-3.1-8b q/k/v": (6144, 4096),
    "llama-3.1-8b o": (4096, 4096),
    "llama-3.1-8b gate/up": (28672, 4096),
    "llama-3.1-8b down": (4096, 14336),
    "llama-3.1-8b lm_head": (128256, 4096),
    "qwen3-0.6b q/k/v": (4096, 1024),
    "qwen3-0.6b down": (1024, 3072),
    "smollm2-135m gate/up": (3072, 576),
}


def timed(launch: Callable[[torch.Tensor], Any], weights: list[torch.Tensor]) -> float:
    """Replay a graph over all weights; return the seconds per weight, as the median of ten replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch(weights[0])
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for weight in weights:
                launch(weight)
        times = []
        for _ in range(11):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
    return median(times[1:]) / len(weights)


def checked(
    x: torch.Tensor, weights: list[torch.Tensor], counters: torch.Tensor, setting: SkinnySetting
) -> tuple[float, float]:
    """Return the relative error against float64, and the seconds."""
    want = x.double() @ weights[0].double().T
    got = skinny_linear(x, weights[0], None, counters, setting)
    error = ((got.double() - want).norm() / want.norm()).item()
    return error, timed(lambda weight: skinny_linear(x, weight, None, counters, setting), weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    counters = torch.zeros(MAX_STRIPS, dtype=torch.int32, device=DEVICE)
    bandwidth, memory = copy_bandwidth(DEVICE), shared_memory_limit(DEVICE)
    print(f"{torch.cuda.get_device_name(DEVICE)}, copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    results: list[dict[str, Any]] = []
    for name, (n, k) in SHAPES.items():
        copies = max(2, min(24, int(3e8 / (n * k * 2)) + 1))
        weights = [torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) * k**-0.5 for _ in range(copies)]
        zeros = torch.zeros(n, device=DEVICE, dtype=torch.bfloat16)
        for rows in arguments.rows:
            x = torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)
            moved = 2 * (n * k + rows * (n + k))
            plain, biased = (timed(lambda weight, x=x, z=z: linear(x, weight, z), weights) for z in (None, zeros))  # type: ignore[misc]
            for setting, seconds in (("library", plain), ("library, bias of zeros", biased)):
                results.append({"shape": name, "rows": rows, "setting": setting, "us": 1e6 * seconds})
                share = 100 * moved / seconds / bandwidth
                print(
                    f"{name:22s} {rows:4d} rows: {setting} {1e6 * seconds:6.1f} us ({share:3.0f} % of copy)",
                    flush=True,
                )
            if rows > MAX_ROWS:
                continue
            default = default_setting(rows, n, k, memory)
            settings = list(dict.fromkeys([default, *candidates(rows, n, k, memory)]))
            lines = []
            for setting in settings:
                error, seconds = checked(x, weights, counters, setting)
                assert error < 1e-2, (name, rows, setting, error)
                lines.append((seconds, setting))
                results.append({"shape": name, "rows": rows, "setting": setting, "us": 1e6 * seconds, "error": error})
            best, rule = min(lines), next(line for line in lines if line[1] == default)
            shares = [100 * moved / seconds / bandwidth for seconds in (rule[0], best[0])]
            print(
                f"{name:22s} {rows:4d} rows: the rule's {1e6 * rule[0]:6.1f} us ({shares[0]:3.0f} % of copy), best "
                f"{1e6 * best[0]:6.1f} ({shares[1]:3.0f} %) {best[1]}",
                flush=True,
            )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"copy_bandwidth": bandwidth, "results": results}, indent=1))


if __name__ == "__main__":
    main()
