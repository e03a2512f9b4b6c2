"""Buckets, capture at the second use, replay, and failing captures; on a device that fakes graphs."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.oracle import Oracle
from support.tiny_models import tiny_model
from support.toy_engine import ToyEngine, run_random_schedule, verify

from hf_async_batching.core.graph_buckets import MOST_PADDED, PADDED_TOKENS, SPREAD_TOKENS, padded_decodes
from hf_async_batching.core.plan import Chunk, Features, NewRow, Plan
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.core.row_layout import PARAMS
from hf_async_batching.core.step_layout import CARRY_OVER, Padding, Sections
from hf_async_batching.devices.base import Graph, Kernel
from hf_async_batching.devices.cpu import CpuDevice
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.forward.step_inputs import StepInputs
from hf_async_batching.runner.cuda_graphs import FORWARD, MAX_FAILED_CAPTURES, PADDED_USES, Captured
from hf_async_batching.runner.model_runner import ModelRunner
from hf_async_batching.runner.row_tables import RowTables
from hf_async_batching.sampling.metadata import SamplingMetadata
from hf_async_batching.sampling.sampler import Sampler
from hf_async_batching.scheduler.prompt_lookup import MAX_DRAFTED


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


def wide_runner(device: FakeGraphDevice | None = None) -> ModelRunner:
    """A runner with many rows and large steps, so that all sizes of steps with prompts come up."""
    return ToyEngine(1, 0, device=device or FakeGraphDevice(), max_batch_tokens=1024, max_rows=40).runner


def spreading_engine(device: FakeGraphDevice, admission: Any = "longest_first") -> ToyEngine:
    """An engine whose steps are just large enough that `longest_first` spreads prompts among them."""
    return ToyEngine(2, 0, device=device, max_batch_tokens=400, max_rows=40, num_pages=200, admission=admission)


def submit(engine: ToyEngine, *requests: Request) -> None:
    for request in requests:
        engine.requests[request.request_id] = request
        engine.engine.add(request)


def run_to_end(engine: ToyEngine) -> None:
    while engine.engine.has_work:
        engine.step()


def decoding_engine(device: FakeGraphDevice, *, max_rows: int, new_tokens: int, steps: int) -> ToyEngine:
    """An engine with four requests, after `steps` steps."""
    engine = ToyEngine(2, 3, device=device, max_rows=max_rows, num_pages=24, max_batch_tokens=16)
    submit(engine, *(Request(str(i), (i + 1, 7, 9), new_tokens) for i in range(4)))
    for _ in range(steps):
        engine.step()
    return engine


def captured_paddings(runner: ModelRunner) -> set[Padding]:
    """The sizes of the captured steps with prompts or drafts."""
    return {key.size for key in runner.graphs.captured if isinstance(key.size, Padding)}


def padded_like(runner: ModelRunner, prompt: int, decodes: int = 0) -> Padding | None:
    """The padding of a step with one prompt of `prompt` tokens beside `decodes` decoding rows."""
    return runner.padding_for(Plan(0, tuple(range(1, 1 + decodes)), (Chunk(99, (7,) * prompt, 1),)), 128)


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
            # Decode steps and steps with prompts each fail this often.
            assert device.captures <= 2 * MAX_FAILED_CAPTURES
            assert engine.runner.buckets == [] or device.captures < 2 * MAX_FAILED_CAPTURES
        else:
            assert device.captures == len(engine.runner.graphs.captured) + min(failures, device.captures)
    assert captures > 40
    assert (replays > 200) == (failures < 100)


class OnlyDecodeSteps(FakeGraphDevice):
    """Refuses to capture steps with prompts."""

    refused = 0

    def capture(self, work: Kernel) -> Graph:
        if "padded_inputs" in work.__code__.co_names:
            self.refused += 1
            raise RuntimeError("cannot be captured")
        return super().capture(work)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("make_device", [FakeGraphDevice, OnlyDecodeSteps])
@pytest.mark.parametrize("draft_rows", [0, 4])
def test_small_steps_with_prompts_or_drafts_are_captured_too(
    depth: int, make_device: type[FakeGraphDevice], draft_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_async_batching.scheduler.sequence.PromptLookup", Oracle)
    monkeypatch.setattr(Oracle, "rng", random.Random(0))
    monkeypatch.setattr("hf_async_batching.runner.cuda_graphs.PADDED_USES", 1)  # so that short schedules capture, too
    padded: list[Padding] = []
    captured: set[Padding] = set()
    original = RowTables.padded_inputs
    monkeypatch.setattr(RowTables, "padded_inputs", lambda self, size: padded.append(size) or original(self, size))
    for seed in range(40):
        device = make_device()
        engine = ToyEngine(depth, seed, device=device, draft_rows=draft_rows, max_batch_tokens=24, num_pages=24)
        verify(engine, run_random_schedule(engine, seed, conversations=seed % 3 == 0))
        assert int(engine.state.lengths[0]) == int(engine.state.last_token[0]) == 0
        prompts = captured_paddings(engine.runner)
        captured |= prompts
        assert engine.runner.buckets, "decode steps keep their graphs"
        if isinstance(device, OnlyDecodeSteps):
            assert device.refused <= MAX_FAILED_CAPTURES
            assert not prompts
    assert len(padded) > 60
    if make_device is FakeGraphDevice:
        assert {size.tokens for size in captured} >= {8, 16, 24}
        assert {size.decodes for size in captured} == {0, 4}


def test_a_step_with_prompts_is_captured_when_its_size_has_come_up_a_few_times() -> None:
    device = FakeGraphDevice()
    engine = ToyEngine(1, 0, device=device, max_batch_tokens=24)
    for i in range(PADDED_USES + 2):
        submit(engine, Request(str(i), (1, 2, 3 + i), 1))
        run_to_end(engine)
        assert (device.captures, device.replays) == ((0, 0) if i < PADDED_USES else (1, i + 1 - PADDED_USES))
    verify(engine, engine.requests)


def test_a_graph_finds_its_inputs_where_they_always_are() -> None:
    """Not in the staged array: there are two of them, and the inputs begin elsewhere in it each time."""
    state = ToyEngine(1, 0, device=FakeGraphDevice(), max_batch_tokens=24).state
    padding = Padding(8, 8)
    for staged in (torch.arange(100, dtype=torch.int32) % 4, torch.arange(100, dtype=torch.int32) % 3):
        sections = padding.sections._replace(new_pages=2)
        state.keep_padded(staged, sections)
        assert torch.equal(state.padded[:64], staged[6:70])
    context = state.padded_inputs(padding).context
    assert context.tile_queries is not None
    assert state.padded_inputs(Padding(8, 4, 4)).context.num_decodes == 4
    runner = ToyEngine(1, 0, device=FakeGraphDevice(), max_batch_tokens=24, max_rows=9)
    largest = Padding(24 + 32, 9 + MAX_DRAFTED, 9)
    assert len(runner.state.out_tokens) == len(runner.state.out_logprobs) == largest.sections.samples
    assert context.tile_queries.untyped_storage().data_ptr() == state.padded.untyped_storage().data_ptr()


def test_which_steps_with_prompts_are_captured() -> None:
    runner = wide_runner()
    assert runner.paddings[0] == 8
    assert runner.paddings[-1] == MOST_PADDED

    def padding(*lengths: int, decodes: int = 0, samples: int | None = 1, **changes: Any) -> Padding | None:
        chunks = [Chunk(1 + i, (7,) * n, n if samples is None else samples) for i, n in enumerate(lengths)]
        plan = Plan(0, tuple(range(10, 10 + decodes)), tuple(chunks), **changes)
        return runner.padding_for(plan, 128)

    assert padding(4) == Padding(8, 8)
    assert padding(7) == Padding(8, 8)
    assert padding(8) == Padding(16, 16), "one token is padding"
    assert padding(15, decodes=3) == Padding(24, 16, 8)
    assert padding(16, decodes=3) == Padding(32, 16, 8)
    assert padding(15, decodes=9) == Padding(48, 16, 32), "few sizes for what decodes"
    assert padding(60, decodes=32) == Padding(96, 16, 32)
    assert padding(3, 1, 2, decodes=40) == Padding(48, 8, 40), "no more entries than tokens"
    assert padding(63, samples=None) == Padding(64, 64), "drafts are sampled throughout"
    assert padding(80, samples=None, decodes=1) == Padding(96, 88, 8)
    assert padding(800, 40, samples=1, decodes=28) == Padding(1024, 16, 32)
    assert padding(*[9] * 20, decodes=28) == Padding(256, 64, 32)
    assert padding(*[9] * 70, decodes=28) == Padding(768, 104, 32), "all that a step can sample"
    assert padding(215, decodes=40) == Padding(256, 16, 40)
    assert padding(127) == Padding(128, 16)
    assert padding(1023) == Padding(1024, 16)
    assert padding(1024) == Padding(1056, 16), "a full step"
    assert padding(992, decodes=32) == Padding(1056, 16, 32), "a full one with rows"
    assert padding(1056) is None, "too many tokens"
    assert padding(200, samples=None) is None, "more samples than there are entries"
    assert padding(4, features=Features(logits=True)) is None
    embeds = Request("a", (0, 0, 0), 9, prompt_embeddings=torch.zeros(3, 2))
    assert padding(2, new_rows=(NewRow(1, embeds),), samples=0) is None
    runner._prompt_embeddings.pieces(Plan(0, (), (Chunk(1, (0, 0), 0),), (NewRow(1, embeds),)))
    assert padding(1) is None, "the last piece of it"
    assert ToyEngine(1, 0, max_batch_tokens=24).runner.paddings == [], "no graphs, no padding"


@pytest.mark.parametrize("admission", ["fcfs", "longest_first"])
def test_steps_among_which_prompts_are_spread_are_captured_in_advance(admission: Any) -> None:
    device = FakeGraphDevice()
    engine = spreading_engine(device, admission)
    runner = engine.runner
    assert padded_like(runner, SPREAD_TOKENS - 33, 32) == Padding(SPREAD_TOKENS, 16, 32), "what `spread_room` leaves"
    engine.state.padded.fill_(3)
    runner.warm(Features())
    few = {
        Padding(tokens, min(tokens - rows, 16), rows) for rows in (0, 8) for tokens in runner.paddings if tokens > rows
    }
    spread = {Padding(SPREAD_TOKENS, 16, size) for size in (0, 8, 32, 40)}
    assert captured_paddings(runner) == (few | spread if admission == "longest_first" else few)
    assert int(engine.state.lengths.sum()) == 0
    before = device.captures
    runner.warm(Features())
    runner.warm(Features(logits=True))
    assert device.captures == before + len(runner.buckets), "forwards alone"
    verify(engine, run_random_schedule(engine, 3))


@pytest.mark.parametrize(("seed", "max_rows"), [(0, 4), (1, 4), (2, 4), (3, 1), (4, 1)])
def test_a_row_alone_decodes_in_a_step_of_two(seed: int, max_rows: int) -> None:
    device = FakeGraphDevice()
    engine = ToyEngine(2, seed, device=device, least_rows=2, max_rows=max_rows)
    assert engine.runner.buckets == ([2, 4] if max_rows == 4 else [2])
    assert engine.runner.bucket_for(1) == 2
    verify(engine, run_random_schedule(engine, 6))
    assert device.replays


def test_which_steps_are_captured_in_advance() -> None:
    def warmed(largest: Padding, max_rows: int = 40, *, spread: bool = True) -> list[Padding]:
        return ModelRunner(
            lambda _: torch.zeros(1), ToyEngine(1, 0).state, FakeGraphDevice(), max_rows=max_rows, largest=largest,
            spread=spread, graphs=True,
        )._warmed  # fmt: skip

    few = warmed(Padding(256, 40, 40))
    assert {padding.tokens for padding in few} == {size for size in PADDED_TOKENS if size <= 256}
    assert {padding.decodes for padding in few} == {0, 8} and few == warmed(Padding(256, 40, 40), spread=False)
    assert Padding(8, 8, 0) in few and not any(padding.tokens <= padding.decodes for padding in few)
    many = warmed(Padding(1024, 100, 512), 512)
    assert len(set(many)) == len(many)
    of_spread = [padding for padding in many if padding.tokens == SPREAD_TOKENS]
    assert {padding.decodes for padding in of_spread} == {size for size in padded_decodes(512) if size < SPREAD_TOKENS}
    assert {padding.decodes for padding in many if padding.tokens != SPREAD_TOKENS} == {0, 8}
    assert all(padding.entries == min(16, padding.tokens - padding.decodes) for padding in many)
    assert max(padding.entries for padding in warmed(Padding(1024, 8, 40))) == 8, "all that a step can sample"


def test_what_cannot_be_captured_is_not_run_in_advance() -> None:
    device = FakeGraphDevice(failures=99)
    runner = spreading_engine(device).runner
    runner.warm(Features())
    assert runner.buckets == runner.paddings == [], "given up with the decode steps"
    assert device.captures == MAX_FAILED_CAPTURES


def test_there_are_only_so_many_graphs_of_steps_with_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, full in ((2, False), (99, False), (99, True)):
        monkeypatch.setattr("hf_async_batching.runner.cuda_graphs.MOST_PADDED_GRAPHS", most)
        device = FakeGraphDevice()
        if full:
            monkeypatch.setattr(device, "graph_bytes", lambda: 1 << 30)
        runner = wide_runner(device)
        for tokens in runner.paddings[:4] * (PADDED_USES + 2):
            runner._padded(Padding(tokens, min(tokens, 16)), Features())
        assert len(runner.graphs.captured) == (0 if full else min(most, 4))
        # What is captured goes on, what will never be is not padded.
        going = [padded_like(runner, prompt) is not None for prompt in (4, 12, 20, 28)]
        assert going == [not full] * 2 + [most > 2 and not full] * 2


def test_steps_that_run_alike_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "as_run", lambda self, features: replace(features, candidates=0))
    device = FakeGraphDevice()
    engine = ToyEngine(1, 0, device=device, max_batch_tokens=1024, max_rows=4)
    runner, pipeline = engine.runner, engine.engine.pipeline
    drawn = Features(sampling=True)
    pipeline.warm(replace(drawn, candidates=64))
    before = device.captures
    assert {key.features for key in runner.graphs.captured} == {drawn}
    pipeline.warm(replace(drawn, candidates=-1))
    engine.engine.add(Request("a", (5, 6), 6, sampling=SamplingParams(do_sample=True, top_p=0.9, seed=1)))
    replays = device.replays
    while engine.engine.has_work:
        engine.engine.step()
    assert device.captures == before and device.replays > replays
    padding = Padding(8, 8)
    for _ in range(PADDED_USES + 1):
        runner._padded(padding, drawn)
    monkeypatch.setattr("hf_async_batching.runner.cuda_graphs.MOST_PADDED_GRAPHS", 1)
    plan = Plan(0, (), (Chunk(1, (7,) * 4, 1),), features=replace(drawn, candidates=64))
    assert runner.padding_for(plan, 128) == padding, "what is captured goes on"


def test_a_failed_capture_is_not_counted_for_ever() -> None:
    """What worked is kept, and a capture that succeeds begins the count anew."""
    device = FakeGraphDevice()
    runner = wide_runner(device)

    def use(tokens: int, times: int = PADDED_USES + 1) -> None:
        for _ in range(times):
            runner._padded(Padding(tokens, 8), Features())

    use(8)
    for tokens in (16, 24):  # each of them fails once, and is then captured
        device.captures, device.failures = 0, 1
        use(tokens)
        assert Captured(Padding(tokens, 8), Features()) not in runner.graphs.captured
        use(tokens, PADDED_USES - 1)
        assert Captured(Padding(tokens, 8), Features()) not in runner.graphs.captured, "not at once"
        use(tokens, 1)
        assert Captured(Padding(tokens, 8), Features()) in runner.graphs.captured
    device.captures, device.failures = 0, 99
    use(32, (MAX_FAILED_CAPTURES + 3) * (PADDED_USES + 1))
    assert device.captures == MAX_FAILED_CAPTURES
    assert runner.buckets
    assert len(runner.graphs.captured) == 3
    assert padded_like(runner, 4) == Padding(8, 8), "what was captured goes on"
    assert padded_like(runner, 28) is None


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
    asked: list[SamplingMetadata | None] = []

    def sampler(logits: torch.Tensor, rows: SamplingMetadata | None, features: Features) -> tuple[torch.Tensor, None]:
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
    assert PackedForward(untied).weight_bytes == total - embedding
    tied = tiny_model("Llama", tie_word_embeddings=True)
    assert PackedForward(tied).weight_bytes == sum({id(p): p.nbytes for p in tied.parameters()}.values())
    assert isinstance(PackedForward(tied).device, torch.device)


def test_a_mixed_step_is_told_which_of_its_tokens_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    original = RowTables.mixed_inputs

    def mixed_inputs(self: RowTables, staged: torch.Tensor, sections: Sections, num_decodes: int = 0) -> StepInputs:
        inputs = original(self, staged, sections, num_decodes)
        start = sections.new_rows * (1 + PARAMS) + 3 * sections.new_pages
        carried = (staged[start : start + sections.tokens] == CARRY_OVER).tolist()
        assert carried == [True] * num_decodes + [False] * (sections.tokens - num_decodes)
        told.append(num_decodes)
        return inputs

    monkeypatch.setattr(RowTables, "mixed_inputs", mixed_inputs)
    engine = ToyEngine(2, 0, max_rows=7, num_pages=24, max_batch_tokens=16)
    verify(engine, run_random_schedule(engine, 0, num_requests=10))
    assert any(told)


def test_warming_captures_every_bucket_and_disturbs_no_request() -> None:
    device = FakeGraphDevice()
    engine = decoding_engine(device, max_rows=7, new_tokens=12, steps=4)
    engine.engine.pipeline.warm(Features())
    sizes = {key.size for key in engine.runner.graphs.captured if key.features == Features()}
    assert {size for size in sizes if isinstance(size, int)} == {1, 2, 4, 7}
    assert {size for size in sizes if isinstance(size, Padding)} == set(engine.runner._warmed)
    before = device.captures
    run_to_end(engine)
    verify(engine, engine.requests)
    assert device.captures == before
    assert int(engine.state.lengths[0]) == int(engine.state.last_token[0]) == 0


def test_another_forward_is_adopted_between_steps() -> None:
    engine = decoding_engine(FakeGraphDevice(), max_rows=4, new_tokens=20, steps=6)
    first_graphs = list(engine.runner.graphs.captured.values())
    assert first_graphs
    calls = []

    def other(inputs: StepInputs) -> torch.Tensor:
        calls.append(inputs)
        return engine.forward(inputs)

    engine.runner.offer(other)
    assert not calls
    run_to_end(engine)
    verify(engine, engine.requests)
    assert calls
    assert not set(map(id, first_graphs)) & set(map(id, engine.runner.graphs.captured.values()))
    assert engine.runner.graphs.captured, "captured anew"
    assert not engine.runner.graphs._replaced, "collected steps let the old graphs go"


def test_replaced_graphs_live_until_no_step_can_replay_them() -> None:
    engine = ToyEngine(1, 0, device=FakeGraphDevice(), max_rows=4)
    runner = engine.runner
    runner.warm(Features())
    graphs = len(runner.graphs.captured)
    runner.offer(engine.forward)
    runner.run(Plan(7, ()), torch.zeros(0, dtype=torch.int32), Sections())
    assert not runner.graphs.captured
    assert [(step, len(held)) for step, held in runner.graphs._replaced] == [(7, graphs)]
    runner.completed(6)
    assert runner.graphs._replaced, "the step that was in flight when they were replaced may have replayed them"
    runner.completed(7)
    assert not runner.graphs._replaced


def test_tuning_measures_for_the_buckets_and_captures_anew() -> None:
    engine = ToyEngine(1, 0, device=FakeGraphDevice(), max_rows=7)
    runner = engine.runner
    runner.warm(Features())
    runner.tune()
    assert not runner.graphs.captured, "captured steps keep the settings that they were captured with"
    assert not runner.graphs._uses, "what new settings compile is compiled before a capture, not in it"

    class Forward:
        tuned: list[int] | None = None

        def __call__(self, inputs: StepInputs) -> torch.Tensor:
            return engine.forward(inputs)

        def tune(self, batches: list[int]) -> None:
            self.tuned = batches
            if fails:
                raise RuntimeError("no memory")

    forward, fails = Forward(), False
    runner.offer(forward)
    runner.tune()
    assert forward.tuned == [1, 2, 4, 7]
    runner.warm(Features())
    fails = True
    with pytest.raises(RuntimeError, match="no memory"):
        runner.tune()
    assert not runner.graphs.captured, "all ranks capture anew, even if one of them could not measure"


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_rare_steps_capture_the_forward_alone(depth: int) -> None:
    """One graph per bucket, whatever is done with its logits; processors run behind each replay."""
    histories = made = captures = 0
    for seed in range(12):
        device = FakeGraphDevice()
        engine = ToyEngine(depth, seed, device=device, max_rows=5, num_pages=24, remembers=True, outputs=True)
        verify(engine, run_random_schedule(engine, seed, num_requests=10))
        assert not engine.wrong_histories
        forwards = [key.size for key in engine.runner.graphs.captured if key.features is FORWARD]
        assert not any(key.features.eager for key in engine.runner.graphs.captured if key.features is not FORWARD)
        histories += engine.histories
        made += sum(map(len, engine.made.values()))
        captures += len(forwards)
    assert histories > 100
    assert made > 100
    assert captures > 12


def test_all_graphs_keep_their_logits_in_one_buffer() -> None:
    runner = wide_runner()
    few, many = runner._kept(torch.ones(2, 5)), runner._kept(torch.full((8, 5), 2.0))
    assert few.data_ptr() == many.data_ptr() and few.shape == (2, 5) and (many == 2).all()
    for other in (torch.ones(2, 5, dtype=torch.float64), torch.ones(2, 6)):
        kept = runner._kept(other)
        assert torch.equal(kept, other) and kept.dtype == other.dtype


def test_a_step_that_samples_nothing_moves_its_row_on_and_commits_no_token() -> None:
    engine = ToyEngine(1, 0, max_batch_tokens=16, device=CpuDevice())
    submit(engine, Request("a", tuple(range(1, 33)), 3))
    engine.state.out_tokens.fill_(-9)
    while not engine.state.lengths.any():
        engine.step()
    assert int(engine.state.lengths.max()) == 16, "the first piece of its prompt"
    assert (engine.state.out_tokens == -9).all()
