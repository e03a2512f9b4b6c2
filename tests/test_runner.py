"""Buckets, capture at the second use, replay, and failing captures; on a device that fakes graphs."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import pytest
import torch
from support.oracle import Oracle
from support.tiny_models import tiny_model
from support.toy_engine import ToyEngine, run_random_schedule, verify

from hf_async_batching.device_state import DeviceState, StepInputs
from hf_async_batching.devices import CpuDevice
from hf_async_batching.devices.base import Graph, Kernel
from hf_async_batching.model_forward import ModelForward
from hf_async_batching.plan import Chunk, Features, NewRow, Plan
from hf_async_batching.request import Request
from hf_async_batching.runner import FORWARD, MAX_FAILED_CAPTURES, decode_buckets, drafted_buckets
from hf_async_batching.sampling import SampledRows
from hf_async_batching.staging import CARRY_OVER, PARAMS, Sections


class FakeGraph:
    def __init__(self, work: Kernel, device: FakeGraphDevice) -> None:
        self.work, self.device = work, device

    def replay(self) -> None:
        self.device.replays += 1
        self.work()


class FakeGraphDevice(CpuDevice):
    """The CPU, with graphs that call what they captured; the first `failures` captures fail."""

    supports_graphs = True

    def __init__(self, failures: int = 0) -> None:
        super().__init__()
        self.failures, self.captures, self.replays = failures, 0, 0

    def capture(self, work: Kernel) -> Graph:
        self.captures += 1
        if self.captures <= self.failures:
            raise RuntimeError("cannot be captured")
        return FakeGraph(work, self)


def test_buckets_grow_to_the_largest_step() -> None:
    assert decode_buckets(1) == [1]
    assert decode_buckets(6) == [1, 2, 4, 6]
    assert decode_buckets(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    for largest in (1, 5, 64, 100, 256):
        buckets = decode_buckets(largest)
        assert buckets == sorted(set(buckets))
        assert buckets[-1] == largest


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("failures", [0, 1, 100])
def test_captured_steps_give_the_same_tokens(depth: int, failures: int) -> None:
    replays = captures = 0
    for seed in range(40):
        device = FakeGraphDevice(failures)
        engine = ToyEngine(depth, seed, device=device, max_rows=7, num_pages=24, max_batch_tokens=16)
        verify(engine, run_random_schedule(engine, seed, num_requests=10))
        assert int(engine.state.lengths[0]) == 0, "the padding row grew"
        replays += device.replays
        captures += device.captures
        if failures == 100:
            assert device.captures <= MAX_FAILED_CAPTURES
            assert engine.runner.buckets == [] or device.captures < MAX_FAILED_CAPTURES
        else:
            assert device.captures == len(engine.runner.captured) + min(failures, device.captures)
    assert captures > 40
    assert (replays > 200) == (failures < 100)


class DraftsCannotBeCaptured(FakeGraphDevice):
    """Refuses what is not a decode step."""

    refused = 0

    def capture(self, work: Kernel) -> Graph:
        if "drafted_inputs" in work.__code__.co_names:
            self.refused += 1
            raise RuntimeError("cannot be captured")
        return super().capture(work)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("make_device", [FakeGraphDevice, DraftsCannotBeCaptured])
def test_steps_with_drafts_are_captured_too(
    depth: int, make_device: type[FakeGraphDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_async_batching.sequence.PromptLookup", Oracle)
    monkeypatch.setattr(Oracle, "rng", random.Random(0))
    replayed: list[int] = []
    sizes: set[int] = set()
    original = DeviceState.drafted_inputs
    monkeypatch.setattr(
        DeviceState, "drafted_inputs", lambda self, size: replayed.append(size) or original(self, size)
    )
    for seed in range(60):
        device = make_device()
        engine = ToyEngine(depth, seed, device=device, draft_rows=4, max_batch_tokens=24, num_pages=24)
        verify(engine, run_random_schedule(engine, seed, conversations=seed % 3 == 0))
        assert int(engine.state.lengths[0]) == int(engine.state.last_token[0]) == 0
        drafts = {key.size for key in engine.runner.captured if key.drafts}
        sizes |= drafts
        assert engine.runner.buckets, "decode steps keep their graphs"
        if isinstance(device, DraftsCannotBeCaptured):
            assert device.refused <= MAX_FAILED_CAPTURES
            assert not drafts
            assert engine.runner.drafted_buckets == [] or device.refused < MAX_FAILED_CAPTURES
    if make_device is FakeGraphDevice:
        assert sizes >= {8, 16}
        assert len(replayed) > 40


def test_what_is_captured_of_steps_with_drafts() -> None:
    assert drafted_buckets(0) == []
    assert drafted_buckets(7) == []
    assert drafted_buckets(1000) == [8, 16, 24, 32, 48, 64, 96, 128]
    runner = ToyEngine(1, 0, device=FakeGraphDevice(), max_batch_tokens=24).runner
    request = Request("a", (1, 2), 9)
    again = NewRow(1, request, 2, again=True)

    def bucket(*lengths: int, **changes: Any) -> int:
        chunks = tuple(Chunk(row, tuple(range(length)), length) for row, length in enumerate(lengths, start=1))
        plan = Plan(0, (3, 4), chunks, **{"new_rows": (again, again._replace(row=2)), **changes})
        return runner.drafted_bucket(plan)

    assert bucket(4) == 8
    assert bucket(3, 2) == 8
    assert bucket(6) == 16, "one entry is padding"
    assert bucket(21) == 24
    assert bucket(22) == 0, "too large"
    assert bucket(3, 2, new_rows=(again, NewRow(2, request))) == 0, "a prompt beside it"
    assert bucket(3, features=Features(logits=True)) == 0
    assert runner.drafted_bucket(Plan(0, (3, 4))) == 0
    assert ToyEngine(1, 0, max_batch_tokens=24).runner.drafted_buckets == [], "no graphs, no padding"


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
@pytest.mark.parametrize("depth", [2, 3])
def test_the_kernels_of_the_tables_give_the_same_tokens(depth: int) -> None:
    surplus = 0
    for seed in range(6):
        engine = ToyEngine(depth, seed, device=FakeGraphDevice(), fused=True, max_rows=5, max_batch_tokens=12)
        requests = run_random_schedule(engine, seed, num_requests=8)
        verify(engine, requests)
        assert not any(int(table[0]) for table in (engine.state.lengths, engine.state.finished))
        surplus += sum(record.tokens for record in engine.engine.records) - sum(map(len, engine.emitted.values()))
    assert surplus > 0, "no row was planned beyond its end"


def test_an_arg_max_needs_no_records() -> None:
    """A plain greedy step neither gathers the rows' parameters nor computes the positions of its tokens."""
    engine = ToyEngine(1, 0, device=FakeGraphDevice())
    asked: list[SampledRows | None] = []

    def sampler(logits: torch.Tensor, rows: SampledRows | None, features: Features) -> tuple[torch.Tensor, None]:
        asked.append(rows)
        return logits.argmax(-1).int(), None

    engine.runner._sampler = sampler  # type: ignore[assignment]
    every = (Features(), Features(logprobs=True), Features(sampling=True), Features(min_length=True))
    for features in every:
        engine.runner._step(engine.state.decode_inputs(2), features)
    assert [rows is not None for rows in asked] == [False, False, True, True]


def test_a_bucket_runs_once_before_it_is_captured() -> None:
    device = FakeGraphDevice()
    engine = ToyEngine(1, 0, device=device)
    run_random_schedule(engine, 0, num_requests=1)
    steps = [record for record in engine.engine.records if record.decode_rows]
    assert device.replays == max(0, len(steps) - 1)
    assert device.captures == min(1, max(0, len(steps) - 1))


def test_weight_bytes_count_what_a_decode_step_reads() -> None:
    untied = tiny_model("Llama")
    total = sum(parameter.nbytes for parameter in untied.parameters())
    embedding = untied.get_input_embeddings().weight.nbytes
    assert ModelForward(untied).weight_bytes == total - embedding
    tied = tiny_model("Llama", tie_word_embeddings=True)
    assert ModelForward(tied).weight_bytes == sum({id(p): p.nbytes for p in tied.parameters()}.values())
    assert isinstance(ModelForward(tied).device, torch.device)


def test_a_mixed_step_is_told_which_of_its_tokens_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    original = DeviceState.mixed_inputs

    def mixed_inputs(self: DeviceState, staged: torch.Tensor, sections: Sections, num_decodes: int = 0) -> StepInputs:
        inputs = original(self, staged, sections, num_decodes)
        start = sections.new_rows * (1 + PARAMS) + 3 * sections.new_pages
        carried = (staged[start : start + sections.tokens] == CARRY_OVER).tolist()
        assert carried == [True] * num_decodes + [False] * (sections.tokens - num_decodes)
        told.append(num_decodes)
        return inputs

    monkeypatch.setattr(DeviceState, "mixed_inputs", mixed_inputs)
    engine = ToyEngine(2, 0, max_rows=7, num_pages=24, max_batch_tokens=16)
    verify(engine, run_random_schedule(engine, 0, num_requests=10))
    assert any(told)


def test_warming_captures_every_bucket_and_disturbs_nobody() -> None:
    device = FakeGraphDevice()
    engine = ToyEngine(2, 3, device=device, max_rows=7, num_pages=24, max_batch_tokens=16)
    requests = {str(i): Request(str(i), (i + 1, 7, 9), 12) for i in range(4)}
    for request in requests.values():
        engine.requests[request.request_id] = request
        engine.engine.add(request)
    for _ in range(4):
        engine.step()
    engine.engine.pipeline.warm(Features())
    assert {key.size for key in engine.runner.captured if key.features == Features()} == {1, 2, 4, 7}
    before = device.captures
    while engine.engine.has_work:
        engine.step()
    verify(engine, requests)
    assert device.captures == before
    assert int(engine.state.lengths[0]) == int(engine.state.last_token[0]) == 0


def test_another_forward_is_adopted_between_steps() -> None:
    device = FakeGraphDevice()
    engine = ToyEngine(2, 3, device=device, max_rows=4, num_pages=24, max_batch_tokens=16)
    requests = {str(i): Request(str(i), (i + 1, 7, 9), 20) for i in range(4)}
    for request in requests.values():
        engine.requests[request.request_id] = request
        engine.engine.add(request)
    for _ in range(6):
        engine.step()
    first_graphs = list(engine.runner.captured.values())
    assert first_graphs
    calls = []

    def other(inputs: StepInputs) -> torch.Tensor:
        calls.append(inputs)
        return engine.forward(inputs)

    engine.runner.offer(other)
    assert not calls
    while engine.engine.has_work:
        engine.step()
    verify(engine, requests)
    assert calls
    assert not set(map(id, first_graphs)) & set(map(id, engine.runner.captured.values()))
    assert engine.runner.captured, "captured anew"
    assert not engine.runner._replaced, "collected steps let the old graphs go"


def test_replaced_graphs_live_until_no_step_can_replay_them() -> None:
    engine = ToyEngine(1, 0, device=FakeGraphDevice(), max_rows=4)
    runner = engine.runner
    runner.warm(Features())
    graphs = len(runner.captured)
    runner.offer(engine.forward)
    runner.run(Plan(7, ()), torch.zeros(0, dtype=torch.int32), Sections())
    assert (len(runner.captured), [(step, len(held)) for step, held in runner._replaced]) == (0, [(7, graphs)])
    runner.completed(6)
    assert runner._replaced, "the step that was in flight when they were replaced may have replayed them"
    runner.completed(7)
    assert not runner._replaced


def test_tuning_measures_for_the_buckets_and_captures_anew() -> None:
    engine = ToyEngine(1, 0, device=FakeGraphDevice(), max_rows=7)
    runner = engine.runner
    runner.warm(Features())
    runner.tune()
    assert not runner.captured, "captured steps keep the settings that they were captured with"

    class Forward:
        tuned: list[int] | None = None

        def __call__(self, inputs: StepInputs) -> torch.Tensor:
            return engine.forward(inputs)

        def tune(self, batches: list[int]) -> None:
            self.tuned = batches

    forward = Forward()
    runner.offer(forward)
    runner.tune()
    assert forward.tuned == [1, 2, 4, 7]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_rare_steps_capture_the_forward_alone(depth: int) -> None:
    """One graph per bucket, whatever is done with its logits; processors run behind each replay."""
    histories = made = captures = 0
    for seed in range(12):
        device = FakeGraphDevice()
        engine = ToyEngine(depth, seed, device=device, max_rows=5, num_pages=24, remembers=True, outputs=True)
        verify(engine, run_random_schedule(engine, seed, num_requests=10))
        assert not engine.wrong_histories
        forwards = [key.size for key in engine.runner.captured if key.features is FORWARD]
        assert not any(key.features.eager for key in engine.runner.captured if key.features is not FORWARD)
        histories += engine.histories
        made += sum(map(len, engine.made.values()))
        captures += len(forwards)
    assert histories > 100
    assert made > 100
    assert captures > 12
