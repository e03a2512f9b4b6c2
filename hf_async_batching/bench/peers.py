"""Runs the same workload with transformers itself, in the same process: `generate_batch` and padded `generate`."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel

from hf_async_batching.bench.measure import Spread
from hf_async_batching.bench.peer_generate import padded_generate
from hf_async_batching.bench.peer_generate_batch import generate_batch
from hf_async_batching.bench.peer_run import Pass, PeerRun, short
from hf_async_batching.bench.workloads import Workload
from hf_async_batching.devices.memory import return_memory

logger = logging.getLogger(__name__)


def run_peer(
    name: str,
    model: PreTrainedModel,
    make_workload: Callable[[int], Workload],
    *,
    repeats: int = 1,
    limit: float = 300.0,
    prefix_cache: bool = True,
) -> PeerRun:
    """Run a workload with a peer. An error becomes part of the outcome. The model's settings are restored afterwards.

    Args:
        name: One of `choices.PEERS`.
        model: The model; its attention and its generation config are restored in the end.
        make_workload: Makes the workload from a seed of its token ids.
        repeats: Number of counted passes; the median pass is reported.
        limit: Seconds after which a pass is stopped.
        prefix_cache: Whether `generate_batch` may share prefixes.
    """
    run = PeerRun(name)
    gc.collect()
    return_memory(model.device)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    with _as_it_was(model):
        try:
            if name == "generate_batch":
                passes = generate_batch(run, model, make_workload, repeats, limit, prefix_cache=prefix_cache)
            else:
                passes = padded_generate(run, model, make_workload, repeats, limit)
            workload = make_workload(0)
            for one in passes:
                _check_lengths(one, workload)
            middle = sorted(passes, key=lambda one: one.seconds)[(len(passes) - 1) // 2]
            run.seconds, run.tokens = middle.seconds, passes[0].tokens
            run.output_tokens = sum(map(len, middle.tokens.values()))
            run.output_tokens_per_second = run.output_tokens / middle.seconds
            run.total_tokens_per_second = (run.output_tokens + workload.prompt_tokens) / middle.seconds
            run.first_token_seconds = Spread.of(middle.first_token_seconds)
            if model.device.type == "cuda":
                run.peak_bytes = torch.cuda.max_memory_allocated(model.device)
        except Exception as error:  # a failed peer is a line of the table
            logger.debug("%s failed", name, exc_info=True)
            run.error = short(error)
    gc.collect()
    return_memory(model.device)
    return run


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Disable the end-of-sequence token inside; restore attention and generation config afterwards."""
    attention, generation = model.config._attn_implementation, model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = generation
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


def _check_lengths(one: Pass, workload: Workload) -> None:
    found = sum(map(len, one.tokens.values()))
    if len(one.tokens) != workload.num_requests or found != workload.new_tokens:
        raise RuntimeError(
            f"{found} tokens of {len(one.tokens)} requests came back, "
            f"not {workload.new_tokens} of {workload.num_requests}"
        )
