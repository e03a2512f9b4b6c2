"""Figures, checked by hand on made-up steps, and runs of the tiny model."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_async_batching import BatchingConfig
from hf_async_batching.bench import measure as measure_module
from hf_async_batching.bench.drive import ThroughEngine, ThroughManager
from hf_async_batching.bench.machine import copy_bandwidth, look_at
from hf_async_batching.bench.measure import KEPT_STEPS, Pace, Spread, Traffic, measure
from hf_async_batching.bench.shapes import random_model
from hf_async_batching.bench.workloads import Workload, make_workload
from hf_async_batching.core.timeline import StepRecord
from hf_async_batching.coverage.families import tiny_model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model("tiny", torch.device("cpu"), torch.float32)


def record(step: int, start: float, end: float, context: int, prompt_tokens: int = 0) -> StepRecord:
    """2 ms of planning, 1 ms of settling."""
    plan, settle = (start - 0.003, start - 0.001), (end, end + 0.001)
    return StepRecord(step, 2, prompt_tokens, 2, context, plan, settle, (start, end), None, None)


STEPS = (
    record(0, 1.000, 1.100, context=50, prompt_tokens=50),
    record(1, 1.100, 1.200, context=52),  # follows a step with a prompt: not a pure decode gap
    record(2, 1.250, 1.300, context=54),  # 0.1 s after the end of step 1, half of it idle
    record(3, 1.300, 1.360, context=56),
    record(5, 1.900, 1.950, context=60),  # step 4 is not there
)


def test_the_figures_of_a_made_up_run() -> None:
    traffic = Traffic(weight_bytes=1000, bytes_per_context_token=10)
    pace = Pace.of(STEPS, 2.0, traffic, bandwidth=20_000.0)
    assert pace.steps == 5
    # Steps 2 and 3 are decode steps behind decode steps: 0.1 s and 0.06 s from end to end.
    assert pace.decode_ms_per_step == pytest.approx(80)
    assert pace.median_decode_ms_per_step == pytest.approx(80)
    # They read 2 * 1000 + (54 + 56) * 10 = 3100 bytes in 0.16 s; 3200 could have been copied.
    assert pace.mbu_decode_percent == pytest.approx(100 * 3100 / 3200)
    # All read 5 * 1000 + (50 + 52 + 54 + 56 + 60) * 10 = 7720 bytes in 2 s.
    assert pace.mbu_run_percent == pytest.approx(100 * 7720 / 40_000)
    # 0.95 s from first to last, 0.36 s of them computed.
    assert pace.ms_per_step == pytest.approx(190)
    assert pace.busy_percent == pytest.approx(100 * 0.36 / 0.95)
    assert pace.host_ms_per_step == pytest.approx(3)
    assert pace.decode_host_ms_per_step == pytest.approx(3)


def test_a_run_without_decode_steps() -> None:
    pace = Pace.of(STEPS[:1], 1.0, Traffic(1, 1), 1.0)
    assert (pace.decode_ms_per_step, pace.mbu_decode_percent) == (0, 0)


def test_a_spread() -> None:
    spread = Spread.of([float(i) for i in range(1, 21)])
    assert spread == Spread(mean=10.5, median=10.5, p95=19.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([]) is None


@pytest.mark.parametrize("driver", [ThroughEngine, ThroughManager])
@pytest.mark.parametrize("depth", [1, 2])
def test_every_step_reads_the_context_that_it_must(model: PreTrainedModel, driver: type[Any], depth: int) -> None:
    """Two requests of 5 + 4 tokens: the prompts' step reads 5 tokens each, then one more each per step."""
    engine = driver(model, BatchingConfig(depth=depth, max_sequence_length=16, idle_timeout=None))
    workload = make_workload("seed", 200, rows=2, prompt=5, new=4)
    try:
        engine.start(workload.brief().first[0])
        engine.warmup()
        served = engine.serve(workload)
    finally:
        engine.close()
    assert [(step.decode_rows, step.prompt_tokens, step.context_tokens) for step in served.records] == [
        (0, 10, 10),
        (2, 0, 12),
        (2, 0, 14),
        (2, 0, 16),
    ]
    assert {name: len(tokens) for name, tokens in served.tokens.items()} == {"0": 4, "1": 4}
    assert len(served.first_token_seconds) == len(served.queue_seconds) == 2
    assert all(0 <= wait <= served.seconds for wait in served.queue_seconds)
    assert all(
        wait <= first < served.seconds
        for wait, first in zip(served.queue_seconds, served.first_token_seconds, strict=True)
    )


@pytest.mark.parametrize("through_engine", [True, False])
def test_a_measured_run(model: PreTrainedModel, through_engine: bool) -> None:
    make = partial(_mix, 6)
    config = BatchingConfig(max_sequence_length=64, timeline_steps=KEPT_STEPS, idle_timeout=None)
    measured = measure(model, make, config, 1e9, through_engine=through_engine, repeats=3)
    run, workload = measured.run, make(0)
    assert run.driver == ("engine" if through_engine else "manager")
    assert (run.requests, run.prompt_tokens) == (6, workload.prompt_tokens)
    assert run.output_tokens == workload.new_tokens == sum(step.tokens for step in measured.records)
    assert len(run.all_seconds) == 3
    assert run.seconds == sorted(run.all_seconds)[1], "the pass of the median time"
    assert run.output_tokens_per_second == pytest.approx(run.output_tokens / run.seconds)
    assert run.total_tokens_per_second > run.output_tokens_per_second
    assert run.full_speed_seconds == pytest.approx(run.start_seconds + run.warmup_seconds)
    assert run.settings["depth"] == 1
    assert run.settings["page_size"] == 256
    assert run.peak_extra_bytes is None
    assert 0 < run.pace.busy_percent <= 100
    assert run.pace.steps == len(measured.records)
    assert [set(tokens) for tokens in measured.tokens] == [set("012345")] * 3
    assert measured.tokens[0] != measured.tokens[1], "every pass has its own prompts"
    assert run.weight_bytes >= sum(parameter.nbytes for parameter in model.parameters())
    assert run.cache_bytes > 0


def _mix(rows: int, seed: int) -> Workload:
    return make_workload("mix", 211, seed=seed, rows=rows, prompt=12, new=9)


@pytest.mark.parametrize("driver", [ThroughEngine, ThroughManager])
def test_conversations_go_on(model: PreTrainedModel, driver: type[Any]) -> None:
    chat = make_workload("chat", 211, rows=3, prompt=10, new=4, turns=3)
    engine = driver(model, BatchingConfig(max_sequence_length=chat.longest, idle_timeout=None))
    try:
        engine.start(chat.brief().first[0])
        served = engine.serve(chat)
    finally:
        engine.close()
    assert set(served.tokens) == {f"{user}{turn}" for user in "012" for turn in ("", ".1", ".2")}
    assert sum(map(len, served.tokens.values())) == chat.new_tokens
    assert len(served.first_token_seconds) == 9


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_conversations_of_a_model_with_states(prefix_cache: bool) -> None:
    """With the prefix cache, later turns start behind what was said before."""
    hybrid = tiny_model("Qwen3_5ForCausalLM")
    config = BatchingConfig(
        page_size=16, max_sequence_length=900, prefix_cache=prefix_cache, idle_timeout=None, attach_check=False
    )
    make = partial(_chat, 190)
    run = measure(hybrid, make, config, 1e9).run
    assert run.output_tokens == make(0).new_tokens
    assert (run.prefix_hit_tokens or 0) >= 256 * prefix_cache
    assert bool(run.prefix_hit_tokens) == prefix_cache


def _chat(vocab: int, seed: int) -> Workload:
    return make_workload("chat", vocab, seed=seed, rows=2, prompt=256, new=4, turns=3)


def test_the_engine_gives_its_memory_back_when_a_run_fails(model: PreTrainedModel) -> None:
    config = BatchingConfig(max_sequence_length=16, idle_timeout=None)
    with pytest.raises(ValueError, match="exceed"):
        measure(model, lambda _: make_workload("seed", 211, rows=1, prompt=15, new=9), config, 1e9)


def test_the_machine() -> None:
    machine = look_at(torch.device("cpu"))
    assert machine.card.startswith("CPU")
    assert machine.versions["torch"] == torch.__version__
    assert machine.versions["CUDA"] is None
    assert "torch" in str(machine) and "TB/s" in str(machine)
    assert 1e8 < copy_bandwidth(torch.device("cpu"), gib=1 / 64) < 1e13


def test_scales_of_quantized_weights_are_read_too() -> None:
    pytest.importorskip("bitsandbytes")
    model = random_model("tiny", torch.device("cpu"), torch.float32, quantize="nf4")
    plain = 2 * 211 * 32 * 4 + 5 * 32 * 4 + sum(buffer.nbytes for buffer in model.buffers())
    # Half a byte a weight, and a scale in float32 for each 64 of them.
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert measure_module._weights(model) == plain + weights // 2 + weights // 64 * 4
