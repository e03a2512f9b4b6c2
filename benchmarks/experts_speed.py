"""How fast one layer's experts are computed: microseconds, and the share of what reading the hit experts takes.

python -m benchmarks.experts_speed                                             # all shapes, 1 to 2,048 tokens
python -m benchmarks.experts_speed --shapes qwen3-30b-a3b --rows 1,32 --sweep  # other blocks, warps, loads in flight
python -m benchmarks.experts_speed --shapes gpt-oss-20b-mxfp4 --rows 1,8,32,256,2048,8192  # packed weights

Layers are captured in one CUDA graph, each with a routing of its own and in turn over several sets of weights, so that
the L2 cache helps as little as in a model. The floor is the bytes of the experts that the routing hit, over the
bandwidth of a large copy. transformers' own functions run beside ours. Errors are against float32.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from hf_async_batching.bench.machine import look_at
from hf_async_batching.devices.shared_memory import shared_memory_limit
from hf_async_batching.experts import reference, triton_experts
from hf_async_batching.experts.layer import GROUP, ExpertWeights, GateForm
from hf_async_batching.experts.settings import (
    EXPANDED_TOKENS,
    FEW_TOKENS,
    ExpertSetting,
    ProductSetting,
    default_setting,
    shared_memory,
)
from hf_async_batching.linear.rounding import worst_relative_error

DEVICE = torch.device("cuda")
_LAYERS, _SETS = 16, 2
_THREADS = min(16, os.cpu_count() or 1)


class Shape(NamedTuple):
    """One layer of experts."""

    hidden: int
    inner: int
    experts: int
    choices: int
    form: GateForm = GateForm()
    transposed: bool = False
    packed: bool = False


_GPT_OSS = GateForm(interleaved=True, alpha=1.702, limit=7.0, shift=1.0)
SHAPES = {
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
    "gpt-oss-20b": Shape(2880, 2880, 32, 4, _GPT_OSS, True),
    "deepseek-v2-lite": Shape(2048, 1408, 64, 6),
    "lfm2-8b-a1b": Shape(2048, 1792, 32, 4),
    "granite-4-h-tiny": Shape(1536, 512, 64, 6),
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "gpt-oss-20b-mxfp4": Shape(2880, 2880, 32, 4, _GPT_OSS, packed=True),
    "gpt-oss-120b-mxfp4": Shape(2880, 2880, 128, 4, _GPT_OSS, packed=True),
}

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, ExpertWeights], torch.Tensor]


class Problem(NamedTuple):
    """Weights, and each layer's inputs."""

    shape: Shape
    weights: list[ExpertWeights]
    inputs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def layers(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, ExpertWeights]]:
        """The arguments of each layer."""
        for given, weights in zip(self.inputs, itertools.cycle(self.weights), strict=False):
            yield *given, weights

    def floor(self, bandwidth: float) -> float:
        """Seconds per layer to read the experts that were hit."""
        one = self.weights[0]
        each = sum(x.nbytes for x in one if isinstance(x, torch.Tensor)) / self.shape.experts
        hit = sum(len(index.unique()) for _, index, _ in self.inputs) / len(self.inputs)
        return hit * each / bandwidth


def weights_of(shape: Shape) -> ExpertWeights:
    def randn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=DEVICE, dtype=torch.bfloat16) * sizes[-1] ** -0.5

    outputs = shape.inner * (1 + shape.form.gated)
    if shape.packed:
        up, down = ((shape.experts, *sizes) for sizes in ((outputs, shape.hidden), (shape.hidden, shape.inner)))
        return ExpertWeights(
            random_bytes(0, 256, *up[:2], up[2] // GROUP, GROUP // 2),
            randn(*up[:2]),
            random_bytes(0, 256, *down[:2], down[2] // GROUP, GROUP // 2),
            randn(*down[:2]),
            False,
            random_bytes(118, 122, *up[:2], up[2] // GROUP),
            random_bytes(118, 122, *down[:2], down[2] // GROUP),
        )
    if shape.transposed:
        up, down = randn(shape.experts, shape.hidden, outputs), randn(shape.experts, shape.inner, shape.hidden)
        return ExpertWeights(up, randn(shape.experts, outputs), down, randn(shape.experts, shape.hidden), True)
    up, down = randn(shape.experts, outputs, shape.hidden), randn(shape.experts, shape.hidden, shape.inner)
    return ExpertWeights(up, None, down, None, False)


def random_bytes(low: int, high: int, *sizes: int) -> torch.Tensor:
    return torch.empty(sizes, device=DEVICE, dtype=torch.uint8).random_(low, high)


def problem_of(shape: Shape, weights: list[ExpertWeights], rows: int) -> Problem:
    inputs = []
    for _ in range(_LAYERS):
        hidden = torch.randn(rows, shape.hidden, device=DEVICE, dtype=torch.bfloat16)
        scores, index = torch.rand(rows, shape.experts, device=DEVICE).topk(shape.choices, dim=-1)
        inputs.append((hidden, index, (scores / scores.sum(-1, keepdim=True)).bfloat16()))
    return Problem(shape, weights, inputs)


def timed(call: Call, problem: Problem) -> float:
    """Seconds per layer in a graph, as the median of ten replays."""
    layers = list(problem.layers())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(*layers[0])
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for layer in layers:
                call(*layer)
        times = []
        for _ in range(11):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
    del graph
    return median(times[1:]) / len(layers)


def of_transformers(function: Callable[..., torch.Tensor], shape: Shape) -> Call:
    """A function of transformers, on a stand-in for its module."""

    def call(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights) -> torch.Tensor:
        module: Any = SimpleNamespace(
            gate_up_proj=layer.up, gate_up_proj_bias=layer.up_bias, down_proj=layer.down,
            down_proj_bias=layer.down_bias, has_gate=True, has_bias=layer.up_bias is not None,
            has_post_expert_norm=False, is_transposed=layer.transposed, num_experts=shape.experts,
            _is_expert_parallel=False, _apply_gate=lambda product: reference.activate(shape.form, product),
        )  # fmt: skip
        return function(module, hidden, index, weights)

    return call


def by_kernel(shape: Shape, setting: ExpertSetting | None = None) -> Call:
    """Our kernels."""

    def call(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights) -> torch.Tensor:
        return triton_experts.experts_by_kernel(hidden, index, weights, layer, shape.form, setting)

    return call


def by_library(shape: Shape) -> Call:
    """Our kernels around the vendor's products."""

    def call(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights) -> torch.Tensor:
        return triton_experts.experts_by_library(hidden, index, weights, layer, shape.form)

    return call


def error_of(call: Call, problem: Problem) -> float:
    hidden, index, weights, layer = next(problem.layers())
    wide = ExpertWeights(*(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in layer))
    want = reference.experts(hidden.float(), index, weights.float(), wide, problem.shape.form)
    return worst_relative_error(call(hidden, index, weights, layer).float(), want)


def rule(shape: Shape, rows: int) -> ExpertSetting:
    return default_setting(
        rows * shape.choices, shape.experts, shape.hidden, shape.inner, 2, shared_memory_limit(DEVICE),
        gated=shape.form.gated, packed=shape.packed,
    )  # fmt: skip


def parts(shape: Shape, problem: Problem, rows: int) -> dict[str, float]:
    """Seconds of each launch."""
    setting = rule(shape, rows)
    size = setting.block_m
    first = problem.inputs[0][0]
    activated = first.new_zeros(rows * shape.choices, shape.inner)
    product = first.new_zeros(rows * shape.choices, shape.hidden)
    out = torch.empty_like(first)
    none = GateForm("none", gated=False)

    def sort(index: torch.Tensor) -> Any:
        return triton_experts.group(index, shape.experts, size) if rows > 1 else None

    sorted_before = {id(index): sort(index) for _, index, _ in problem.inputs}

    def up(*given: Any) -> Any:
        hidden, index, _, layer = given
        grouping = sorted_before[id(index)]
        triton_experts._product(
            hidden, layer.up, layer.up_scales, layer.up_bias, activated, index, grouping, layer, shape.form, size,
            setting.up,
        )  # fmt: skip

    def down(*given: Any) -> Any:
        _, index, _, layer = given
        grouping = sorted_before[id(index)]
        triton_experts._product(
            activated, layer.down, layer.down_scales, layer.down_bias, product, index, grouping, layer, none, size,
            setting.down,
        )  # fmt: skip

    def combine(*given: Any) -> Any:
        triton_experts._combine(product, None, given[1], given[2], None, out, shape.experts)

    found = {} if rows == 1 else {"group": timed(lambda *given: sort(given[1]), problem)}
    return found | {"up": timed(up, problem), "down": timed(down, problem), "combine": timed(combine, problem)}


def _seconds(result: tuple[float, ExpertSetting]) -> float:
    return result[0]


def choices_of(size: int, *, gated: bool, packed: bool) -> list[ProductSetting]:
    """Settings worth measuring."""
    memory = shared_memory_limit(DEVICE)
    found = []
    if packed:
        for outputs, block_k, warps, stages in itertools.product(
            (32, 64, 128, 256), (64, 128, 256), (2, 4, 8), (3, 5)
        ):
            setting = ProductSetting(outputs // (1 + gated), block_k, warps, stages)
            # A warp takes 16 outputs at least, and each thread unpacks at most 256 weights at a time.
            if not 16 <= outputs // warps <= 64 or outputs * block_k // warps > 8192 or outputs * size // warps > 4096:
                continue
            if shared_memory(size, setting, 2, gated=gated, packed=True) <= memory:
                found.append(setting)
        return found
    for block_n, block_k, warps in itertools.product((16, 32, 64, 128), (64, 128, 256), (4, 8)):
        if warps == 8 and block_n * (1 + gated) < 128:
            continue
        for stages in (3, 4, 6):
            setting = ProductSetting(block_n, block_k, warps, stages)
            held = shared_memory(size, setting, 2, gated=gated)
            if 24 * 1024 <= held <= memory and block_n * (1 + gated) * size <= 16384:
                found.append(setting)
    return found


def compile_all(shape: Shape, problem: Problem, settings: list[ExpertSetting]) -> None:
    """Compile in several threads; what fails here fails again where it is measured."""

    def run(setting: ExpertSetting) -> None:
        with contextlib.suppress(Exception), torch.inference_mode():
            by_kernel(shape, setting)(*next(problem.layers()))

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(run, settings))
    torch.cuda.synchronize()


def sweep(shape: Shape, problem: Problem, rows: int, floor: float) -> None:
    """The best settings of the first product with the rule's second, then of the second."""
    usual = rule(shape, rows)
    more = () if rows <= 64 else (32, 64) if rows <= FEW_TOKENS and shape.packed else (32, 64, 128)
    sizes = sorted({usual.block_m, *more})
    results: list[tuple[float, ExpertSetting]] = []
    for size in sizes:
        base = usual._replace(block_m=size)
        for which in ("up", "down"):
            of_size = []
            choices = choices_of(size, gated=which == "up" and shape.form.gated, packed=shape.packed)
            settings = [base._replace(**{which: choice}) for choice in choices]
            compile_all(shape, problem, settings)
            for setting in settings:
                try:
                    of_size.append((timed(by_kernel(shape, setting), problem), setting))
                except Exception as error:
                    print(f"    {setting}: {type(error).__name__}", flush=True)
            of_size.sort(key=_seconds)
            for seconds, setting in of_size[:6]:
                mark = f"{seconds * 1e6:8.1f} us {floor / seconds:5.0%}"
                print(f"    m {size} {which}: {mark} {tuple(getattr(setting, which))}", flush=True)
            base = of_size[0][1]
            results += of_size[:1]
    seconds, setting = min(results, key=_seconds)
    error = error_of(by_kernel(shape, setting), problem)
    print(f"    best: {seconds * 1e6:.1f} us {floor / seconds:.0%}, error {error:.1e}, {setting}", flush=True)


def main() -> None:
    def counts(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=list(SHAPES)[:5])
    parser.add_argument("--rows", type=counts, default=[1, 8, 32, 256, 2048])
    parser.add_argument("--sweep", action="store_true")
    given = parser.parse_args()
    machine = look_at(DEVICE)
    print(machine)
    torch.manual_seed(0)
    with torch.inference_mode():
        for name in given.shapes:
            shape = SHAPES[name]
            weights = [weights_of(shape) for _ in range(_SETS)]
            for rows in given.rows:
                problem = problem_of(shape, weights, rows)
                floor = problem.floor(machine.copy_bandwidth)
                print(f"{name}, {rows} rows: floor {floor * 1e6:.1f} us, rule {tuple(rule(shape, rows))}", flush=True)
                calls = {
                    "kernels": by_kernel(shape),
                    "library": by_library(shape),
                }
                if not shape.packed:
                    calls["grouped_mm"] = of_transformers(grouped_mm_experts_forward, shape)
                if rows <= 32 and not shape.packed:
                    calls["batched_mm"] = of_transformers(batched_mm_experts_forward, shape)
                for label, call in calls.items():
                    seconds, error = timed(call, problem), error_of(call, problem)
                    few = rows < EXPANDED_TOKENS if shape.packed else rows <= FEW_TOKENS
                    serves = (label == "kernels") == few and label in ("kernels", "library")
                    mark = f"{seconds * 1e6:9.1f} us {floor / seconds:5.0%}, error {error:.1e}"
                    print(f"  {label:10} {mark}{' *' if serves else ''}", flush=True)
                if rows <= FEW_TOKENS or shape.packed:
                    print("  " + ", ".join(f"{k} {v * 1e6:.1f}" for k, v in parts(shape, problem, rows).items()))
                if given.sweep:
                    sweep(shape, problem, rows, floor)
            del weights
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
