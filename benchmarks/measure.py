"""Measurements that every benchmark shares: bandwidth of the card, a run of an engine, and its accuracy gate."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass, replace

import torch
from transformers import PreTrainedModel

from hf_async_batching import BatchingConfig
from hf_async_batching.assembly import assemble
from hf_async_batching.request import Request
from hf_async_batching.timeline import Timeline


@dataclass(frozen=True)
class Run:
    """One run of a workload; times in seconds unless the name says otherwise."""

    depth: int
    graphs: bool
    seconds: float
    steps: int
    tokens_per_second: float
    ms_per_step: float
    decode_ms_per_step: float
    busy_percent: float
    host_ms_per_step: float
    mbu_percent: float
    graph_count: int
    graph_mib: float

    def row(self) -> str:
        return (
            f"| {self.depth} | {'yes' if self.graphs else 'no'} | {self.seconds:.2f} | {self.tokens_per_second:,.0f} "
            f"| {self.decode_ms_per_step:.2f} | {self.busy_percent:.1f} | {self.host_ms_per_step:.3f} "
            f"| {self.mbu_percent:.1f} |"
        )

    def as_dict(self) -> dict[str, float | int | bool]:
        return asdict(self)


HEADER = (
    "| depth | graphs | s | tok/s | ms/step (decode) | GPU busy % | host ms/step | MBU % |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def copy_bandwidth(device: torch.device, gib: float = 2.0) -> float:
    """Bytes per second, read plus written, of a large copy on the device; median of 20."""
    elements = int(gib * (1 << 30) / 4)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(23):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * source.nbytes / sorted(times[3:])[10]


def run_engine(
    model: PreTrainedModel, requests: list[Request], config: BatchingConfig, bandwidth: float | None, warm: bool = True
) -> tuple[Run, dict[str, list[int]]]:
    """Serve `requests`, all there at the start, without a thread in between, so that plans do not depend on timing.

    With `warm`, the workload runs twice and the second run, in which every graph is captured, is measured.
    """
    # The second run must compute its prompts again.
    assembly = assemble(model, replace(config, prefix_cache=False))
    engine = assembly.engine
    tokens: dict[str, list[int]] = {}
    for attempt in range(2 if warm else 1):
        tokens = {request.request_id: [] for request in requests}
        engine.records.clear()
        first_step = engine.scheduler._step
        for request in requests:
            engine.add(request)
        if assembly.forward.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.inference_mode():
            while engine.has_work:
                for emission in engine.step():
                    if emission.token is not None:
                        tokens[emission.request_id].append(emission.token)
        seconds = time.perf_counter() - started
        del attempt
    timeline = Timeline(tuple(engine.records))
    decodes = [r for r in timeline.steps if not r.prompt_tokens]
    gaps = [b.compute[1] - a.compute[1] for a, b in itertools.pairwise(decodes) if b.step == a.step + 1]
    decode_ms = 1e3 * sum(gaps) / max(1, len(gaps))
    per_token = sum(layer.bytes_per_token for layer in assembly.forward.layers)
    live = sum(len(r.prompt) + r.max_new_tokens / 2 for r in requests)
    step_bytes = assembly.forward.weight_bytes + per_token * live
    mbu = step_bytes / (decode_ms * 1e-3) / bandwidth if bandwidth else 0.0
    run = Run(
        depth=assembly.config.depth,
        graphs=bool(assembly.runner.buckets),
        seconds=seconds,
        steps=engine.scheduler._step - first_step,
        tokens_per_second=sum(map(len, tokens.values())) / seconds,
        ms_per_step=timeline.ms_per_step,
        decode_ms_per_step=decode_ms,
        busy_percent=100 * timeline.busy_fraction,
        host_ms_per_step=timeline.host_ms_per_step,
        mbu_percent=100 * mbu,
        graph_count=len(assembly.runner.captured),
        graph_mib=engine.device.graph_bytes() / (1 << 20),
    )
    engine.close()
    return run, tokens


@dataclass(frozen=True)
class Accuracy:
    """How generated tokens compare with a teacher-forced plain forward of the same model."""

    tokens: int
    argmax_percent: float
    largest_gap: float

    def __str__(self) -> str:
        return (
            f"{self.argmax_percent:.2f} % of {self.tokens} tokens are the plain forward's arg-max; "
            f"largest logit gap of the others {self.largest_gap:.3f}"
        )


@torch.no_grad()
def teacher_forced(model: PreTrainedModel, requests: list[Request], tokens: dict[str, list[int]]) -> Accuracy:
    """Correctness contract 2: every token is the arg-max of the plain forward over its own history, or close to it."""
    same = total = 0
    worst = 0.0
    for request in requests:
        new = torch.tensor(tokens[request.request_id], device=model.device)
        ids = torch.cat([torch.tensor(request.prompt, device=model.device), new])
        logits = model(ids[None], use_cache=False).logits[0, len(request.prompt) - 1 : -1].float()
        gap = logits.max(-1).values - logits.gather(1, new[:, None])[:, 0]
        same += int((gap == 0).sum())
        total += len(new)
        worst = max(worst, gap.max().item())
    return Accuracy(total, 100 * same / total, worst)
