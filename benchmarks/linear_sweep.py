"""Skinny matrix products on one GPU: which settings stream a weight fastest, beside cuBLAS.

python -m benchmarks.linear_sweep --out DIR
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
import triton

from hf_async_batching.linear.skinny_kernel import skinny_linear_kernel, skinny_linear_tma_kernel

SHAPES = {
    "8b qkv": (6144, 4096),
    "8b o": (4096, 4096),
    "8b gate_up": (28672, 4096),
    "8b down": (4096, 14336),
    "8b lm_head": (128256, 4096),
    "0.6b qkv": (4096, 1024),
    "0.6b o": (1024, 2048),
    "0.6b gate_up": (6144, 1024),
    "0.6b down": (1024, 3072),
    "0.6b lm_head": (151936, 1024),
    "smol qkv": (960, 576),
    "smol gate_up": (3072, 576),
    "smol down": (576, 1536),
}
ROWS = {"8b": (16, 32, 64, 128, 256), "0.6b": (32, 256), "smol": (32, 256)}


def candidates(rows: int) -> list[tuple[Any, ...]]:
    """(kind, BLOCK_N, BLOCK_K, warps, stages)"""
    out = []
    m = max(16, triton.next_power_of_2(rows))
    for kind, n, k, w, s in [
        ("wf", 64, 128, 4, 4),
        ("wf", 64, 128, 4, 5),
        ("wf", 64, 256, 4, 3),
        ("wf", 128, 64, 4, 5),
        ("wf", 128, 128, 4, 3),
        ("wf", 128, 128, 4, 4),
        ("wf", 128, 128, 8, 4),
        ("wf", 256, 64, 8, 4),
        ("xf", 32, 256, 4, 4),
        ("xf", 64, 128, 4, 5),
        ("xf", 64, 256, 4, 3),
        ("xf", 128, 128, 4, 4),
        ("tma", 64, 128, 4, 5),
        ("tma", 64, 256, 4, 4),
        ("tma", 128, 64, 4, 6),
        ("tma", 128, 128, 4, 4),
        ("tma", 128, 128, 4, 5),
        ("tma", 128, 128, 8, 4),
        ("tma", 256, 64, 8, 5),
        ("tma", 256, 128, 8, 3),
        ("wfp", 64, 128, 4, 5),
        ("wfp", 128, 128, 4, 4),
    ]:
        if (n + m) * k * 2 * s <= 220_000 and not (m >= 128 and (kind == "xf" or n == 32)):
            out.append((kind, n, k, w, s))
    return out


class Problem:
    def __init__(self, n: int, k: int, rows: int, copies: int) -> None:
        self.n, self.k, self.rows = n, k, rows
        self.weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5 for _ in range(copies)]
        self.x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
        self.partial = torch.empty(16, rows, n, device="cuda")
        self.counters = torch.zeros(8192, device="cuda", dtype=torch.int32)

    def run(self, weight: torch.Tensor, config: tuple[Any, ...], splits: int) -> None:
        kind, bn, bk, warps, stages = config
        bm = max(16, triton.next_power_of_2(self.rows))
        per_split = triton.cdiv(triton.cdiv(self.k, bk), splits)
        grid = (triton.cdiv(self.n, bn), splits)
        if kind == "tma":
            from triton.tools.tensor_descriptor import TensorDescriptor

            skinny_linear_tma_kernel[grid](
                TensorDescriptor.from_tensor(self.x, [bm, bk]), TensorDescriptor.from_tensor(weight, [bn, bk]),
                self.out, self.out, self.partial, self.counters, self.rows, self.n, self.k, per_split, bm, bn, bk,
                splits, False, True, num_warps=warps, num_stages=stages,
            )  # fmt: skip
            return
        extra = {"launch_pdl": True} if kind == "wfp" else {}
        skinny_linear_kernel[grid](
            self.x, weight, self.out, self.out, self.partial, self.counters, self.rows, self.n, self.k,
            self.x.stride(0), per_split, bm, bn, bk, splits, False, self.k % bk == 0, kind != "xf", kind == "wfp",
            num_warps=warps, num_stages=stages, **extra,
        )  # fmt: skip


def timed(work: Any, repeats: int = 12) -> float:
    """Seconds of one replay of a graph of `work`, median."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        graph.replay()
        times = []
        for _ in range(repeats):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            graph.replay()
            b.record()
            b.synchronize()
            times.append(a.elapsed_time(b) * 1e-3)
    return sorted(times)[len(times) // 2]


def split_choices(n: int, k: int, bn: int, bk: int) -> list[int]:
    strips = triton.cdiv(n, bn)
    return [s for s in (1, 2, 4, 8) if (s == 1 or strips * s <= 132 * 6) and k // bk >= 2 * s]


def all_problems() -> list[tuple[str, int]]:
    return [(name, rows) for name in SHAPES for rows in ROWS[name.split()[0]]]


def warm(index: int, of: int) -> None:
    """Compile a share of the kernels into Triton's cache on disk."""
    seen = set()
    jobs = []
    for name, rows in all_problems():
        n, k = SHAPES[name]
        for config in candidates(rows):
            for splits in split_choices(n, k, config[1], config[2]):
                key = (max(16, triton.next_power_of_2(rows)), config, splits, k % config[2] == 0)
                if key not in seen:
                    seen.add(key)
                    jobs.append((rows, config, splits, k % config[2] == 0))
    for rows, config, splits, even in jobs[index::of]:
        problem = Problem(256, config[2] * 16 if even else 576, rows, 1)
        try:
            problem.run(problem.weights[0], config, splits)
        except Exception as error:
            print("compile", rows, config, splits, repr(error)[:100], flush=True)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=150)
    arguments = parser.parse_args()
    began = time.perf_counter()
    if arguments.workers:
        context = multiprocessing.get_context("spawn")
        pool = [context.Process(target=warm, args=(i, arguments.workers)) for i in range(arguments.workers)]
        for process in pool:
            process.start()
        for process in pool:
            process.join()
        print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    size = 1 << 29
    a, b = torch.randn(size, device="cuda"), torch.empty(size, device="cuda")
    copy = 8 * size / timed(lambda: torch.add(a, 1.0, out=b))
    del a, b
    print(f"copy {copy / 1e12:.2f} TB/s")
    rows_out = []
    for name, rows in all_problems():
        if arguments.only and arguments.only not in name:
            continue
        if time.perf_counter() - began > arguments.seconds:
            print("out of time")
            break
        n, k = SHAPES[name]
        copies = max(2, min(24, int(3e8 / (n * k * 2)) + 1))
        problem = Problem(n, k, rows, copies)
        expected = problem.x.float() @ problem.weights[0].float().T
        moved = n * k * 2 + rows * (n + k) * 2
        results = []
        cublas = timed(lambda: [torch.nn.functional.linear(problem.x, w) for w in problem.weights]) / copies
        for config, _ in itertools.product(candidates(rows), [0]):
            for splits in split_choices(n, k, config[1], config[2]):
                try:
                    problem.out.fill_(float("nan"))
                    problem.run(problem.weights[0], config, splits)
                    error = ((problem.out.float() - expected).norm() / expected.norm()).item()
                    if not error < 1e-2:
                        print("WRONG", name, rows, config, splits, error)
                        continue
                    seconds = timed(lambda: [problem.run(w, config, splits) for w in problem.weights], 5) / copies
                except Exception as error:
                    print("failed", name, rows, config, splits, repr(error)[:80])
                    continue
                results.append((seconds, config, splits))
                rows_out.append({"shape": name, "rows": rows, "config": config, "splits": splits, "us": seconds * 1e6})
        results.sort(key=lambda r: r[0])
        results = results or [(1.0, (), 0)]
        best = "  ".join(f"{s * 1e6:.1f} {c} x{p}" for s, c, p in results[:4])
        print(
            f"{name:14s} M={rows:3d} cublas {cublas * 1e6:6.1f} us {100 * moved / cublas / copy:3.0f} % | best "
            f"{100 * moved / results[0][0] / copy:3.0f} %: {best}",
            flush=True,
        )
        rows_out.append({"shape": name, "rows": rows, "config": "cublas", "us": cublas * 1e6})
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "linear_sweep.json").write_text(json.dumps({"copy": copy, "rows": rows_out}))


if __name__ == "__main__":
    main()
