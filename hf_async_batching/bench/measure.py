"""One measured run of our engine, and how every figure is computed."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_async_batching.bench.drive import Driver, Served, ThroughEngine, ThroughManager
from hf_async_batching.bench.workloads import Workload
from hf_async_batching.config import BatchingConfig
from hf_async_batching.core.timeline import StepRecord, Timeline
from hf_async_batching.devices.memory import return_memory
from hf_async_batching.engine.builder import EngineParts
from hf_async_batching.engine.stats import read_stats

# No workload takes more steps, so the records of a whole run are kept.
KEPT_STEPS = 1 << 20

# Seeds of the token ids in uncounted runs. Counted runs have seeds from 0, so they share no prefix with these.
_START_SEED = -1
_WARM_SEED = -2

_SWITCHABLE = ("compile", "fuse_weights", "cuda_graphs", "prefix_cache")

MakeWorkload = Callable[[int], Workload]


@dataclass(frozen=True, slots=True)
class Spread:
    """The distribution of a time per request, in seconds. `p95` is the smallest time that 95 % do not exceed."""

    mean: float
    median: float
    p95: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Summarize `values`; None without values."""
        if not values:
            return None
        ordered = sorted(values)
        return cls(statistics.mean(ordered), statistics.median(ordered), ordered[math.ceil(0.95 * len(ordered)) - 1])


@dataclass(frozen=True, slots=True)
class Traffic:
    """The bytes that a step must read: all weights once, and the live keys and values of its rows once.

    Writes are not counted. Layers with a sliding window count as if they read the whole context.
    """

    weight_bytes: int
    bytes_per_context_token: int

    @classmethod
    def of(cls, assembly: EngineParts) -> Traffic:
        """The traffic of an engine's model."""
        forward = assembly.forward
        return cls(forward.weight_bytes, sum(layer.bytes_per_token for layer in forward.layers))

    def of_steps(self, steps: Sequence[StepRecord]) -> int:
        """Bytes that `steps` must read."""
        context = sum(step.context_tokens for step in steps)
        return len(steps) * self.weight_bytes + context * self.bytes_per_context_token


@dataclass(frozen=True, slots=True)
class Pace:
    """Figures computed from the times of steps.

    Attributes:
        steps: Steps of the run.
        ms_per_step: Mean over all steps, idle gaps included.
        decode_ms_per_step: Mean over decode-only steps that follow a decode-only step. A step's time is from the end
            of the earlier step's compute to the end of its own, so that gaps count.
        median_decode_ms_per_step: Median over the same steps.
        busy_percent: Share of the time, from the start of the first step to the end of the last one, in which a step
            was computed.
        host_ms_per_step: Planning, launching and settling, without waiting. Mean over all steps.
        decode_host_ms_per_step: The same over the decode-only steps.
        mbu_decode_percent: Memory bandwidth utilization (Databricks' term; gpt-fast reports the same figure) over the
            steps of `decode_ms_per_step`: `Traffic` over their time, over the copy bandwidth.
        mbu_run_percent: The same over all steps and the whole time of the run.
    """

    steps: int
    ms_per_step: float
    decode_ms_per_step: float
    median_decode_ms_per_step: float
    busy_percent: float
    host_ms_per_step: float
    decode_host_ms_per_step: float
    mbu_decode_percent: float
    mbu_run_percent: float

    @classmethod
    def of(cls, records: Sequence[StepRecord], seconds: float, traffic: Traffic, bandwidth: float) -> Pace:
        """Compute the figures of a run.

        Args:
            records: The steps, oldest first.
            seconds: The time of the run, as its caller saw it.
            traffic: The bytes that the steps must read.
            bandwidth: Bytes per second that the device can copy, read plus written.
        """
        timeline = Timeline(tuple(records))
        decodes = [
            (after, after.compute[1] - before.compute[1])
            for before, after in itertools.pairwise(records)
            if not (before.prompt_tokens or after.prompt_tokens) and after.step == before.step + 1
        ]
        gaps = [gap for _, gap in decodes]
        decode_bytes = traffic.of_steps([step for step, _ in decodes])
        return cls(
            steps=len(records),
            ms_per_step=timeline.ms_per_step,
            decode_ms_per_step=1e3 * statistics.mean(gaps) if gaps else 0.0,
            median_decode_ms_per_step=1e3 * statistics.median(gaps) if gaps else 0.0,
            busy_percent=100 * timeline.busy_fraction,
            host_ms_per_step=timeline.host_ms_per_step,
            decode_host_ms_per_step=Timeline(tuple(r for r in records if not r.prompt_tokens)).host_ms_per_step,
            mbu_decode_percent=100 * decode_bytes / sum(gaps) / bandwidth if gaps else 0.0,
            mbu_run_percent=100 * traffic.of_steps(records) / seconds / bandwidth,
        )


@dataclass(frozen=True, slots=True)
class BenchRun:
    """The figures of a workload at one depth, from the pass with the median time of `all_seconds`.

    Attributes:
        depth: Steps in flight.
        driver: "manager", as users run it, or "engine", without the engine's thread.
        settings: The engine's configuration, with its automatic fields filled in.
        switched_off: Settings that the caller turned off; settings that the engine itself turned off are not listed.
        requests: Requests served.
        prompt_tokens: Tokens of their prompts.
        output_tokens: Tokens generated.
        seconds: From the arrival of the first requests to the last token.
        all_seconds: Seconds of every counted pass.
        output_tokens_per_second: Generated tokens over `seconds`.
        total_tokens_per_second: Prompt and generated tokens over `seconds`.
        pace: Figures computed from the times of the steps.
        start_seconds: From the creation of a fresh engine to the first token of its first request.
        warmup_seconds: The time of `GenerationManager.warmup()` after that.
        full_speed_seconds: From the engine's creation to the end of the warm-up, after which nothing is compiled.
        graphs_captured_late: Graphs that were captured after the warm-up nevertheless.
        first_token_seconds: From a request's arrival to its first token.
        queue_seconds: From a request's arrival to the first step that computes its prompt.
        weight_bytes: All weights and buffers of the model.
        cache_bytes: The KV cache.
        peak_extra_bytes: Peak of the allocated memory, beyond weights and KV cache, from the engine's creation to the
            end of the run; None on the CPU.
        peak_extra_reserved_bytes: The same for the memory that torch reserved.
        graphs: Captured graphs.
        graph_bytes: Memory that they hold.
        preemptions: How many times a request gave up its pages.
        prefix_hit_tokens: Prompt tokens found in the prefix cache; None without a prefix cache.
    """

    depth: int
    driver: str
    settings: dict[str, Any]
    switched_off: tuple[str, ...]
    requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    all_seconds: tuple[float, ...]
    output_tokens_per_second: float
    total_tokens_per_second: float
    pace: Pace
    start_seconds: float
    warmup_seconds: float
    full_speed_seconds: float
    graphs_captured_late: int
    first_token_seconds: Spread | None
    queue_seconds: Spread | None
    weight_bytes: int
    cache_bytes: int
    peak_extra_bytes: int | None
    peak_extra_reserved_bytes: int | None
    graphs: int
    graph_bytes: int
    preemptions: int
    prefix_hit_tokens: int | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Measured:
    """A run and its output: the tokens by request id in each counted pass, and the steps of the pass in `run`."""

    run: BenchRun
    tokens: list[dict[str, list[int]]]
    records: tuple[StepRecord, ...]


def measure(
    model: PreTrainedModel,
    make_workload: MakeWorkload,
    config: BatchingConfig,
    bandwidth: float,
    *,
    through_engine: bool = False,
    repeats: int = 1,
) -> Measured:
    """Start an engine, warm it up, and serve a workload `repeats` times.

    Args:
        model: The model to serve; the measurement does not change it.
        make_workload: Makes the workload from a seed of its token ids.
        config: Settings; `timeline_steps` must hold a whole run (`KEPT_STEPS` does).
        bandwidth: Bytes per second of a copy, read plus written.
        through_engine: Step the engine directly, without the manager and its thread.
        repeats: Counted passes, each with other token ids.
    """
    device = model.device
    gc.collect()
    return_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = make_workload(_START_SEED).brief().first[0]
    passes: list[tuple[Served, int, int | None]] = []
    started = time.perf_counter()
    driver: Driver = (ThroughEngine if through_engine else ThroughManager)(model, config)
    try:
        driver.start(first)
        start_seconds = time.perf_counter() - started
        driver.warmup()
        full_speed_seconds = time.perf_counter() - started
        driver.serve(make_workload(_WARM_SEED).brief())
        assembly = driver.assembly
        graphs_before = len(assembly.runner.graphs.captured)
        for seed in range(repeats):
            workload = make_workload(seed)
            before = read_stats(assembly, 0)
            served = driver.serve(workload)
            after = read_stats(assembly, 0)
            passes.append((served, after.preemptions - before.preemptions, _hits(after, before)))
        peak = _peak(device)
        taken = _weights(model) + after.cache_bytes
        settings = {f.name: getattr(assembly.config.settings, f.name) for f in fields(assembly.config.settings)}
        traffic = Traffic.of(assembly)
        depth, late = assembly.config.depth, len(assembly.runner.graphs.captured) - graphs_before
        del assembly
    finally:
        driver.close()
    served, preemptions, hits = sorted(passes, key=lambda one: one[0].seconds)[(len(passes) - 1) // 2]
    output_tokens = sum(map(len, served.tokens.values()))
    run = BenchRun(
        depth=depth,
        driver="engine" if through_engine else "manager",
        settings=settings,
        switched_off=tuple(name for name in _SWITCHABLE if getattr(config, name, None) is False),
        requests=workload.num_requests,
        prompt_tokens=workload.prompt_tokens,
        output_tokens=output_tokens,
        seconds=served.seconds,
        all_seconds=tuple(one.seconds for one, *_ in passes),
        output_tokens_per_second=output_tokens / served.seconds,
        total_tokens_per_second=(output_tokens + workload.prompt_tokens) / served.seconds,
        pace=Pace.of(served.records, served.seconds, traffic, bandwidth),
        start_seconds=start_seconds,
        warmup_seconds=full_speed_seconds - start_seconds,
        full_speed_seconds=full_speed_seconds,
        graphs_captured_late=late,
        first_token_seconds=Spread.of(served.first_token_seconds),
        queue_seconds=Spread.of(served.queue_seconds),
        weight_bytes=taken - after.cache_bytes,
        cache_bytes=after.cache_bytes,
        peak_extra_bytes=peak[0] - taken if peak is not None else None,
        peak_extra_reserved_bytes=peak[1] - taken if peak is not None else None,
        graphs=after.graphs,
        graph_bytes=after.graph_bytes,
        preemptions=preemptions,
        prefix_hit_tokens=hits,
    )
    return Measured(run, [one.tokens for one, *_ in passes], served.records)


def _hits(after: object, before: object) -> int | None:
    hits: int | None = getattr(after, "prefix_hit_tokens", None)
    return None if hits is None else hits - int(getattr(before, "prefix_hit_tokens", 0))


def _peak(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def _weights(model: PreTrainedModel) -> int:
    parameters = list(model.parameters())
    states = [getattr(parameter, "quant_state", None) for parameter in parameters]
    scales = [state.absmax for state in states if state is not None]  # of 4-bit weights
    tensors = {id(tensor): tensor for tensor in (*parameters, *scales, *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
