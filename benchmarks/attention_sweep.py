"""Checks and times every candidate configuration of the paged attention kernels on the shapes that matter.

Each candidate first runs on fresh random data into an output full of NaN. Its relative error against float32 torch is
shown beside its time. A time is the median over replays of one CUDA graph, which reads more KV caches than the L2
cache holds. Prints the best configuration of each case last, and writes every row as JSON to `--out`.

    python -m benchmarks.attention_sweep --out sweep.json      on a GPU, under 100 s
    python -m benchmarks.attention_sweep --quick               a dry run of tiny shapes in Triton's interpreter
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from hf_async_batching.bench.machine import copy_bandwidth

PAGE_SIZE = 16
Row = dict[str, Any]

# Query rows, cached tokens, warps, stages of a program, and a bound on its registers.
PREFILL_SIZES = [
    *((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 5), (128, 64, 8, 3, 128), (128, 32, 8, 3, 128)),
    *((128, 32, 8, 5, 128), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3, 168)),
    *((64, 64, 4, 3, 128), (64, 64, 4, 5), (64, 32, 4, 3, 128), (64, 32, 4, 5, 128), (64, 128, 4, 3)),
]
# Cached tokens, warps, stages (an even number of stages compiles as the odd number below it).
DECODE_SIZES = [(32, 2, 3), (32, 2, 5), (64, 4, 3), (64, 4, 5), (32, 2, 7), (32, 4, 5), (16, 1, 5), (128, 4, 3)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for all rows, as JSON")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=95.0, help="start no measurement after this long")
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="tiny shapes in Triton's interpreter")
    return parser.parse_args()


class Candidate(NamedTuple):
    """A configuration: its label, the keyword arguments that select it, and a key of its compiled kernel."""

    label: str
    arguments: dict[str, Any]
    compiled: tuple[object, ...]


class Timer:
    """Measures the seconds of one launch: the median over replays of a graph with many launches."""

    def __init__(self, replays: int, cuda: bool) -> None:
        self.replays, self.cuda = replays, cuda

    def __call__(self, work: list[Callable[[], object]]) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            for piece in work:
                piece()
            return (time.perf_counter() - begin) / len(work)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work[0]()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for piece in work:
                piece()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.replays + 1)]
        for _ in range(3):
            graph.replay()
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]
        return statistics.median(times) / 1000 / len(work)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the error of the worst head of the worst query; NaN counts. A norm over all heads would hide it."""
    error = (actual.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(error.nan_to_num(nan=float("inf")).max())


class Pages:
    """Several KV caches of `rows` rows with one shuffled page table; row 0 and page 0 are scratch."""

    def __init__(self, rows: int, context: int, kv_heads: int, size: int, dtype: torch.dtype, device: str, fill: int):
        per_row = -(-context // PAGE_SIZE)
        shape = (rows * per_row + 1, PAGE_SIZE, kv_heads, size)
        self.bytes_read = 2 * rows * context * kv_heads * size * dtype.itemsize
        self.pairs = [
            (torch.randn(shape, dtype=dtype, device=device), torch.randn(shape, dtype=dtype, device=device))
            for _ in range(max(2, -(-fill // self.bytes_read)))
        ]
        ids = torch.randperm(shape[0] - 1, dtype=torch.int32, device=device) + 1
        self.table = torch.cat([ids.new_zeros(1, per_row), ids.view(rows, per_row)])

    def gathered(self, pair: int, row: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one row in float32, [kv_heads, context, size]."""
        key, value = (
            cache[self.table[row].long()].flatten(0, 1)[:context].float().transpose(0, 1) for cache in self.pairs[pair]
        )
        return key, value


class DecodeCase:
    """One query token for each of `rows` rows that hold `context` tokens each."""

    kind = "decode"

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str, fill: int) -> None:
        self.rows, self.heads, self.kv_heads, self.size, self.context = shape
        self.name = f"decode {self.rows} rows, {self.heads}/{self.kv_heads} heads x {self.size}, at {self.context}"
        self.pages = Pages(self.rows, self.context, self.kv_heads, self.size, dtype, device, fill)
        self.query = torch.randn(self.rows, self.heads, self.size, dtype=dtype, device=device)
        self.ids = torch.arange(1, self.rows + 1, dtype=torch.int32, device=device)
        self.lengths = torch.full_like(self.ids, self.context)
        self.output = torch.empty_like(self.query)
        self.counters = torch.zeros(16384, dtype=torch.int32, device=device)
        self.work = self.pages.bytes_read

    def candidates(self) -> Iterable[Candidate]:
        from hf_async_batching.attention import triton_kernels as kernels

        device = self.query.device
        group = self.heads // self.kv_heads
        rule = kernels.default_decode_config(
            self.rows, self.kv_heads, group, self.size, self.size, self.query.dtype, device
        )
        programs = self.rows * self.kv_heads
        if device.type == "cpu":
            every = [(1, 32, 4, 2), (2, 32, 4, 2), (3, 32, 4, 2, 1), (3, 32, 4, 2, 1, False)]
        else:
            wanted = (1, 2, 3, 4, 6, 8) if programs >= 128 else (8, 16, 32, 64)
            wanted = [splits for splits in wanted if splits * programs <= 8192 and self.context // splits >= 64]
            every = [(splits, *sizes, 64) for splits in wanted for sizes in DECODE_SIZES]
            few = [splits for splits in wanted if splits > 1][:3]
            every += [(splits, *sizes, 64, False) for splits in few for sizes in DECODE_SIZES[:2]]
            if torch.cuda.get_device_capability()[0] >= 9:
                every += [(splits, *sizes, 64, True, True) for splits in wanted[:4] for sizes in DECODE_SIZES[:6]]
        configs = [("", kernels.DecodeConfig(*values)) for values in every]
        for label, config in [("default", rule), *configs, ("default again", rule)]:  # shows the effect of the order
            shown = label or " ".join(f"{name} {value}" for name, value in config._asdict().items())
            # One split has no parts to combine. The compiled kernel does not depend on the number of splits.
            compiled = (config.splits > 1, config.splits > 1 and config.fused, config.pdl, *config[1:4])
            yield Candidate(shown, {"config": config}, compiled)

    def launch(self, arguments: dict[str, Any], pair: int = 0, lengths: torch.Tensor | None = None) -> torch.Tensor:
        from hf_async_batching.attention import triton_kernels as kernels

        return kernels.decode_attention(
            self.query, *self.pages.pairs[pair], self.pages.table, self.ids,
            self.lengths if lengths is None else lengths, scaling=self.size**-0.5, out=self.output,
            counters=self.counters, **arguments,
        )  # fmt: skip

    def error(self, arguments: dict[str, Any]) -> float:
        """Return the error for a few rows, with lengths that end inside pages."""
        self.query.normal_()
        self.output.fill_(float("nan"))
        lengths = self.lengths - torch.arange(self.rows, dtype=torch.int32, device=self.ids.device) % 19
        pair = int(torch.randint(len(self.pages.pairs), ()))
        actual = self.launch(arguments, pair, lengths)
        worst = 0.0 if actual.isfinite().all() else float("inf")
        for entry in {0, self.rows // 2, self.rows - 1}:
            key, value = self.pages.gathered(pair, entry + 1, int(lengths[entry]))
            query = self.query[entry].float().view(self.kv_heads, -1, self.size)
            weights = (query @ key.transpose(1, 2) * self.size**-0.5).softmax(-1)
            worst = max(worst, relative_error(actual[entry], (weights @ value).view(self.heads, self.size)))
        return float("inf") if self.counters.any() else worst

    def baselines(self) -> dict[str, Callable[[], object]]:
        return {}


class PrefillCase:
    """`rows` prompts, or pieces of prompts, of `tokens` tokens that begin at `position`."""

    kind = "prefill"

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str, fill: int) -> None:
        from hf_async_batching.attention.triton_kernels import PREFILL_TILE

        self.rows, self.tokens, self.position, self.heads, self.kv_heads, self.size = shape
        self.name = (
            f"prefill {self.rows} x {self.tokens} at {self.position}, {self.heads}/{self.kv_heads} heads x {self.size}"
        )
        context = self.position + self.tokens
        self.pages = Pages(self.rows, context, self.kv_heads, self.size, dtype, device, fill)
        self.query = torch.randn(self.rows * self.tokens, self.heads, self.size, dtype=dtype, device=device)
        self.output = torch.empty_like(self.query)
        tiles = [
            (row + 1, row * self.tokens + start, min(PREFILL_TILE, self.tokens - start), self.position + start)
            for row in range(self.rows)
            for start in range(0, self.tokens, PREFILL_TILE)
        ]
        self.tiles = [torch.tensor(column, dtype=torch.int32, device=device) for column in zip(*tiles, strict=True)]
        seen = self.tokens * self.position + self.tokens * (self.tokens + 1) // 2
        self.work = 4 * self.rows * seen * self.heads * self.size  # operations of two products

    def candidates(self) -> Iterable[Candidate]:
        from hf_async_batching.attention.triton_kernels import PREFILL_TILE, prefill_block_sizes
        from hf_async_batching.attention.triton_prefill import BlockSizes

        group = self.heads // self.kv_heads
        rule = prefill_block_sizes(self.size, self.size, group, self.query.dtype)
        if self.query.device.type == "cpu":
            every = [BlockSizes(32, 16, 4, 2)]
        else:
            every = [BlockSizes(*sizes) for sizes in PREFILL_SIZES if sizes[0] <= PREFILL_TILE * group]
        yield Candidate("default", {}, rule)
        for sizes in every:
            label = " ".join(f"{name} {value}" for name, value in sizes._asdict().items())
            yield Candidate(label, {"config": sizes}, sizes)

    def launch(self, arguments: dict[str, Any], pair: int = 0) -> torch.Tensor:
        from hf_async_batching.attention import triton_kernels as kernels

        return kernels.prefill_attention(
            self.query, *self.pages.pairs[pair], self.pages.table, *self.tiles, scaling=self.size**-0.5,
            out=self.output, **arguments,
        )  # fmt: skip

    def error(self, arguments: dict[str, Any]) -> float:
        self.query.normal_()
        self.output.fill_(float("nan"))
        pair = int(torch.randint(len(self.pages.pairs), ()))
        actual = self.launch(arguments, pair)
        row = int(torch.randint(self.rows, ()))
        key, value = self.pages.gathered(pair, row + 1, self.position + self.tokens)
        worst = 0.0 if actual.isfinite().all() else float("inf")
        # Only a few queries of the row are checked: the scores of all would not fit into memory.
        for token in {0, 1, self.tokens // 2, self.tokens - 1, int(torch.randint(self.tokens, ()))}:
            query = self.query[row * self.tokens + token].float().view(self.kv_heads, -1, self.size)
            visible = self.position + token + 1
            weights = (query @ key[:, :visible].transpose(1, 2) * self.size**-0.5).softmax(-1)
            expected = (weights @ value[:, :visible]).view(self.heads, self.size)
            worst = max(worst, relative_error(actual[row * self.tokens + token], expected))
        return worst

    def baselines(self) -> dict[str, Callable[[], object]]:
        """Return torch's attention on the same lengths, without pages. Heads are repeated before, if it needs that."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.attention.bias import causal_lower_right

        shape = (self.rows, self.kv_heads, self.position + self.tokens, self.size)
        query = self.query.view(self.rows, self.tokens, self.heads, self.size).transpose(1, 2)
        key, value = (torch.randn(shape, dtype=query.dtype, device=query.device) for _ in range(2))
        whole = self.position == 0
        if not whole:
            key, value = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (key, value))
        mask = None if whole else causal_lower_right(self.tokens, self.position + self.tokens)

        def sdpa(backend: SDPBackend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, is_causal=whole, enable_gqa=whole
                )

        names = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        return {f"torch {name}": lambda backend=backend: sdpa(backend) for name, backend in names.items()}  # type: ignore[misc]


Case = DecodeCase | PrefillCase

DECODE = [
    (32, 32, 8, 128, 512),
    (32, 32, 8, 128, 1024),
    (32, 32, 8, 128, 2048),
    (32, 32, 8, 128, 4096),
    (32, 32, 8, 128, 8192),
    (256, 32, 8, 128, 800),
    (256, 16, 8, 128, 320),
    (256, 9, 3, 64, 320),
    (8, 32, 8, 128, 2048),
    (1, 32, 8, 128, 4096),
]
PREFILL = [
    (1, 2048, 0, 32, 8, 128),
    (4, 512, 0, 32, 8, 128),
    (1, 512, 4096, 32, 8, 128),
    (1, 2048, 0, 16, 8, 128),
    (4, 512, 0, 16, 8, 128),
]


def make_cases(arguments: argparse.Namespace, device: str) -> list[Case]:
    dtype = torch.float16 if arguments.quick else getattr(torch, arguments.dtype)
    if arguments.quick:
        decode: Case = DecodeCase((3, 4, 2, 32, 70), dtype, device, 0)
        return [decode, PrefillCase((2, 40, 20, 4, 2, 32), dtype, device, 0)]
    cases: list[Case] = [DecodeCase(shape, dtype, device, 2**29) for shape in DECODE]
    cases += [PrefillCase(shape, dtype, device, 2**27) for shape in PREFILL]
    return [case for case in cases if arguments.only in case.name]


def compile_all(cases: list[Case], limit: float) -> None:
    """Compile the candidates in parallel within `limit` seconds. The measurement reports those that fail here."""
    wanted: dict[object, Callable[[], object]] = {}
    for case in cases:
        for candidate in case.candidates():
            heads = (case.kind, case.heads, case.kv_heads, case.size, case.pages.table.shape[1] % 16 == 0)
            key = (*heads, candidate.compiled)
            wanted.setdefault(key, lambda case=case, candidate=candidate: case.launch(candidate.arguments))  # type: ignore[misc]

    begin, failed = time.perf_counter(), []

    def attempt(launch: Callable[[], object]) -> None:
        try:
            if time.perf_counter() - begin < limit:
                launch()
        except Exception:
            failed.append(launch)

    with ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 2))) as pool:
        list(pool.map(attempt, wanted.values()))
    seconds = time.perf_counter() - begin
    print(f"{len(wanted)} kernels, {len(failed)} failed, compiled in {seconds:.1f} s", flush=True)


def measure(case: Case, timer: Timer, copy: float, deadline: float) -> list[Row]:
    rows: list[Row] = []

    def add(label: str, seconds: float, error: float | None, config: object) -> None:
        row: Row = {"case": case.name, "kind": case.kind, "config": label, "arguments": config, "us": seconds * 1e6}
        row["error"] = error
        if case.kind == "decode":
            row |= {"GB/s": case.work / seconds / 1e9, "of copy": case.work / seconds / copy}
        else:
            row["TFLOP/s"] = case.work / seconds / 1e12
        rows.append(row)

    for candidate in case.candidates():
        if time.perf_counter() > deadline:
            print("  time is up: the rest of this case was not measured", flush=True)
            break
        try:
            error = case.error(candidate.arguments)
            pieces = [
                lambda pair=pair: case.launch(candidate.arguments, pair)  # type: ignore[misc] # noqa: B023
                for pair in range(len(case.pages.pairs))
            ]
            add(candidate.label, timer(pieces), error, candidate.arguments.get("config"))
        except Exception as failure:
            rows.append({"case": case.name, "config": candidate.label, "failed": str(failure)[:200]})
    if timer.cuda and time.perf_counter() < deadline:
        for label, work in case.baselines().items():
            try:
                add(label, timer([work] * 4), None, None)
            except Exception as failure:
                rows.append({"case": case.name, "config": label, "failed": str(failure)[:200]})
    return rows


def show(case: Case, rows: list[Row], tolerance: float, best: int = 3) -> None:
    """Print the default, the best few correct candidates, and torch, for one case."""
    rows = [row for row in rows if row["case"] == case.name]
    timed = [row for row in rows if "us" in row]
    right = [row for row in timed if row["error"] is not None and row["error"] < tolerance]
    chosen = [row for row in right if row["config"].startswith("default")]
    chosen += sorted((row for row in right if row not in chosen), key=lambda row: row["us"])[:best]
    chosen += [row for row in timed if row["error"] is None]
    print(f"\n{case.name}")
    for row in chosen:
        speed = (
            f"{row['GB/s']:6.0f} GB/s {row['of copy']:6.1%} of copy"
            if case.kind == "decode"
            else f"{row['TFLOP/s']:6.0f} TFLOP/s"
        )
        error = "" if row["error"] is None else f"  error {row['error']:.1e}"
        print(f"  {row['us']:9.1f} us {speed}  {row['config']}{error}")
    for row in timed:
        if row["error"] is not None and not row["error"] < tolerance:
            print(f"  WRONG: {row['config']}: error {row['error']:.1e}")
    failures = [row for row in rows if "failed" in row]
    if failures:
        print(f"  {len(failures)} failed, for one {failures[0]['config']}: {failures[0]['failed'][:100]}")


def main() -> None:
    arguments = parse()
    begin = time.perf_counter()
    if arguments.quick and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads the variable at its import, which can happen early.
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.attention_sweep", *sys.argv[1:]])
    if not arguments.quick and not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA GPU; --quick is a dry run without.")
    device = "cpu" if arguments.quick else "cuda"
    timer = Timer(arguments.replays, not arguments.quick)
    copy = copy_bandwidth(torch.device(device))
    cases = make_cases(arguments, device)
    if not arguments.quick:
        compile_all(cases, arguments.seconds / 2)
    rows: list[Row] = []
    for case in cases:
        rows += measure(case, timer, copy, begin + arguments.seconds)
        print(f"{time.perf_counter() - begin:6.1f} s  {case.name}: {len(rows)} rows", flush=True)
    import triton

    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": arguments.dtype,
        "copy GB/s": copy / 1e9,
        "seconds": time.perf_counter() - begin,
    }
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1, default=str))
    for case in cases:
        show(case, rows, tolerance=2e-3 if arguments.quick else 2e-2)
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()))


if __name__ == "__main__":
    main()
