"""Processors that the engine does not know get what they get in `generate`, and harm their own request alone."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

import pytest
import torch
from support.tiny_models import greedy_alone, tiny_model
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from hf_async_batching import BatchingConfig, GenerationManager, UnsupportedArgumentError

IDS = torch.tensor([[0, 0, 0, 9, 10, 11], [12, 13, 14, 15, 16, 17], [0, 18, 19, 20, 21, 22]])
MASK = (IDS != 0).long()


class Recorder(LogitsProcessor):
    """Keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls.append((input_ids.clone(), scores.clone()))
        return scores


class Sure(LogitsProcessor):
    """Leaves one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, float("-inf"))
        only[:, self.token] = scores[:, self.token]
        return only


def named(arguments: dict[str, Any]) -> str:
    """Name a test by what does not change from run to run: workers of pytest-xdist compare the names."""
    return re.sub(" object at 0x[0-9a-f]+", "", str(arguments))


class Fails(LogitsProcessor):
    def __init__(self, length: int, error: BaseException) -> None:
        self.length, self.error = length, error

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= self.length:
            raise self.error
        return scores


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama")


@pytest.fixture(scope="module", params=[1, 2])
def manager(model: Any, request: pytest.FixtureRequest) -> Any:
    with GenerationManager(model, BatchingConfig(page_size=16, depth=request.param, debug=True)) as manager:
        yield manager


@pytest.mark.parametrize("ends", [None, 2])
def test_the_batch_is_that_of_generate(model: Any, manager: Any, ends: int | None) -> None:
    """Histories and scores of all rows together, padding and rows that have ended included."""
    plain, ours = Recorder(), Recorder()
    arguments = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    # One that the first row says early.
    tokens = model.generate(**arguments, eos_token_id=None)[:, IDS.shape[1] :]
    arguments["eos_token_id"] = None if ends is None else int(tokens[0, ends])
    expected = model.generate(**arguments, logits_processor=LogitsProcessorList([plain]))
    out = model.generate(**arguments, logits_processor=LogitsProcessorList([ours]), custom_generate=manager.bind())
    assert torch.equal(out, expected)
    assert len(plain.calls) == len(ours.calls)
    for (ids, scores), (our_ids, our_scores) in zip(plain.calls, ours.calls, strict=True):
        assert torch.equal(our_ids, ids)
        torch.testing.assert_close(our_scores, scores, rtol=1e-4, atol=1e-4)
        assert our_ids.dtype == torch.int64 and our_scores.dtype == torch.float32


class PerRow(LogitsProcessor):
    """One grammar per row: row r says 20 + r."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(scores, float("-inf"))
        out[torch.arange(len(out)), 20 + torch.arange(len(out))] = 0.0
        return out


class Nth(LogitsProcessor):
    """State per step."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        out = torch.full_like(scores, float("-inf"))
        out[:, self.step] = 0.0
        return out


class Script(LogitsProcessor):
    """A matcher per row, made in the first call."""

    def __init__(self) -> None:
        self.at: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.at = self.at or list(range(len(input_ids)))
        out = torch.full_like(scores, float("-inf"))
        for row in range(len(input_ids)):
            out[row, 10 + self.at[row]] = 0.0
            self.at[row] += 1
        return out


class Across(LogitsProcessor):
    """Each row gets what the others would say."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + scores.sum(0, keepdim=True) - 2 * scores


@pytest.mark.parametrize("make", [PerRow, Nth, Script, Across])
@pytest.mark.parametrize("returned", [1, 2])
def test_processors_that_look_at_the_whole_batch(model: Any, manager: Any, make: Any, returned: int) -> None:
    arguments: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 6, "pad_token_id": 0}
    if returned == 1:
        arguments["do_sample"] = False
    else:  # a draw that leaves nothing to chance
        arguments |= {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    arguments |= {"eos_token_id": [11, 14], "return_dict_in_generate": True, "output_scores": True}
    plain = model.generate(**arguments, logits_processor=LogitsProcessorList([make()]))
    others = [manager.submit([7 + i, 8], max_new_tokens=20, do_sample=False, eos_token_id=None) for i in range(3)]
    got = model.generate(**arguments, logits_processor=LogitsProcessorList([make()]), custom_generate=manager.bind())
    assert torch.equal(got.sequences, plain.sequences)
    for ours, theirs in zip(got.scores, plain.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    for i, other in enumerate(others):
        usual = greedy_alone(model, [7 + i, 8], 20, eos_token_id=None, pad_token_id=0)
        assert other.result(60).token_ids == usual


def test_others_do_not_wait_for_a_slow_processor(model: Any, manager: Any) -> None:
    release = threading.Event()

    def slow(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        release.wait(60)
        return scores

    held = manager.submit([5, 6], max_new_tokens=3, do_sample=False, eos_token_id=None, logits_processor=[slow])
    other = manager.submit([7, 8], max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert other.result(60).token_ids == greedy_alone(model, [7, 8], 40, eos_token_id=None, pad_token_id=0)
    assert not held.done
    release.set()
    assert held.result(60).token_ids == greedy_alone(model, [5, 6], 3, eos_token_id=None, pad_token_id=0)


def test_a_thread_that_cannot_start_fails_its_own_request(
    model: Any, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a process that has used up its threads."""
    manager.warmup()
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if "processors of" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    other = manager.submit([7, 8], max_new_tokens=40, do_sample=False, eos_token_id=None)
    monkeypatch.setattr(threading.Thread, "start", limited)
    failed = manager.submit([5, 6], max_new_tokens=3, do_sample=False, logits_processor=[Recorder()])
    with pytest.raises(RuntimeError, match="new thread"):
        failed.result(60)
    assert other.result(60).token_ids == greedy_alone(model, [7, 8], 40, eos_token_id=None, pad_token_id=0)
    assert manager.stats().running == 0


def test_requests_that_share_a_processor_call_it_one_at_a_time(manager: Any) -> None:
    inside = most = 0

    def counts(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.002)
        inside -= 1
        return scores

    handles = [
        manager.submit([5 + i, 6], max_new_tokens=6, do_sample=False, eos_token_id=None, logits_processor=[counts])
        for i in range(6)
    ]
    assert all(len(handle.result(60).token_ids) == 6 for handle in handles)
    assert most == 1


def test_a_slow_processor_keeps_an_idle_engine_alive(model: Any) -> None:
    def slow(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        time.sleep(0.3)
        return scores

    with GenerationManager(model, BatchingConfig(page_size=16, idle_timeout=0.05)) as manager:
        handle = manager.submit([5, 6], max_new_tokens=3, do_sample=False, eos_token_id=None, logits_processor=[slow])
        assert handle.result(60).token_ids == greedy_alone(model, [5, 6], 3, eos_token_id=None, pad_token_id=0)


def test_a_slow_processor_gives_its_row_to_those_that_wait(model: Any) -> None:
    """And goes on later with the token that it has chosen."""
    release = threading.Event()

    def slow(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        release.wait(60)
        return scores

    with GenerationManager(model, BatchingConfig(page_size=16, max_rows=1, max_batch_tokens=32)) as manager:
        held = manager.submit([5, 6], max_new_tokens=3, do_sample=False, eos_token_id=None, logits_processor=[slow])
        other = manager.submit([7, 8], max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert other.result(60).token_ids == greedy_alone(model, [7, 8], 5, eos_token_id=None, pad_token_id=0)
        release.set()
        assert held.result(60).token_ids == greedy_alone(model, [5, 6], 3, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("batch", [False, True])
def test_a_seed_draws_the_same_tokens_with_and_without_a_processor(model: Any, manager: Any, batch: bool) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "eos_token_id": None}
    recorder = LogitsProcessorList([Recorder()])
    if batch:
        arguments |= {"attention_mask": MASK, "pad_token_id": 0, "custom_generate": manager.bind(seed=7)}
        usual = model.generate(IDS, **arguments)
        assert torch.equal(model.generate(IDS, **arguments, logits_processor=recorder), usual)
    else:
        usual = manager.submit([5, 6, 7], **arguments, seed=7).result(60).token_ids
        ours = manager.submit([5, 6, 7], **arguments, seed=7, logits_processor=recorder).result(60).token_ids
        assert ours == usual


class RowWise(Recorder):
    row_wise = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        super().__call__(input_ids, scores)
        return scores - scores.roll(1, -1)


@pytest.mark.parametrize("rows", [3, 9])
def test_processors_that_are_declared_row_wise(model: Any, rows: int) -> None:
    """Each row by itself, so that there may be more than the engine holds at once."""
    ids = torch.stack([torch.tensor([5 + i, 6, 7]) for i in range(rows)])
    arguments: dict[str, Any] = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    plain, ours = RowWise(), RowWise()
    expected = model.generate(**arguments, logits_processor=LogitsProcessorList([plain]))
    with GenerationManager(model, BatchingConfig(page_size=16, max_rows=4, max_batch_tokens=32)) as manager:
        out = model.generate(**arguments, logits_processor=LogitsProcessorList([ours]), custom_generate=manager.bind())
    assert torch.equal(out, expected)
    assert {ids.shape[0] for ids, _ in ours.calls} == {1}
    assert len(ours.calls) == 4 * rows


def test_a_batch_that_does_not_fit_is_refused_by_name(model: Any) -> None:
    ids = torch.arange(5, 32).view(9, 3)
    arguments: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with GenerationManager(model, BatchingConfig(page_size=16, max_rows=4, max_batch_tokens=32)) as manager:
        call = {**arguments, "logits_processor": LogitsProcessorList([Recorder()])}
        with pytest.raises(UnsupportedArgumentError, match=r"`logits_processor`: 9 rows.*row_wise = True"):
            model.generate(ids, **call, custom_generate=manager.bind())
        served = model.generate(ids, **call, custom_generate=manager.bind(on_unsupported="generate"))
        assert torch.equal(served, model.generate(ids, **arguments))
        # Those of transformers' own are known to look at each row by itself.
        twice = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.0), RepetitionPenaltyLogitsProcessor(3.0)])
        known = model.generate(ids, **arguments, logits_processor=twice, custom_generate=manager.bind())
        assert torch.equal(known, model.generate(ids, **arguments, logits_processor=twice))


def test_criteria_and_streamer_in_lockstep(model: Any, manager: Any) -> None:
    """As `generate` calls them: the criterion sees pads behind rows that it has ended, and the scores so far."""
    seen: dict[bool, list[Any]] = {False: [], True: []}

    class Ends(StoppingCriteria):
        eos_token_id = torch.tensor([96])  # which makes `generate` pad rows that have ended

        def __init__(self, ours: bool) -> None:
            self.calls = seen[ours]

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.calls.append((input_ids.tolist(), [line.shape for line in scores]))
            return torch.tensor([input_ids.shape[1] >= 8 + 2 * row for row in range(len(input_ids))])

    class Script(BaseStreamer):
        def __init__(self) -> None:
            self.got: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.got.append(value.tolist())

        def end(self) -> None:
            self.got.append("end")

    outs = []
    for ours in (False, True):
        how = {"custom_generate": manager.bind()} if ours else {}
        outs.append(
            model.generate(
                IDS, attention_mask=MASK, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None,
                logits_processor=LogitsProcessorList([Across()]), stopping_criteria=[Ends(ours)],
                return_dict_in_generate=True, output_scores=True, **how,
            ).sequences
        )  # fmt: skip
    assert torch.equal(*outs)
    assert seen[True] == seen[False]
    streams = []
    for ours in (False, True):
        how = {"custom_generate": manager.bind()} if ours else {}
        streams.append(Script())
        model.generate(
            IDS[1:2], max_new_tokens=5, do_sample=False, pad_token_id=0, streamer=streams[-1],
            logits_processor=LogitsProcessorList([Recorder()]), **how,
        )  # fmt: skip
    assert streams[0].got == streams[1].got


def test_tokens_that_the_mask_hides_are_shown_as_they_are(model: Any, manager: Any) -> None:
    recorder = Recorder()
    ids = torch.tensor([[0, 9, 10, 0, 11]])
    out = model.generate(
        ids, attention_mask=(ids != 0).long(), max_new_tokens=3, do_sample=False, eos_token_id=None,
        logits_processor=LogitsProcessorList([recorder]), custom_generate=manager.bind(),
    )  # fmt: skip
    assert [call[0].tolist() for call, _ in recorder.calls] == [out[0, : 5 + i].tolist() for i in range(3)]
    assert out[0, 5:].tolist() == greedy_alone(model, [9, 10, 11], 3, eos_token_id=None, pad_token_id=0)


def test_a_model_in_half_precision_shows_scores_in_float32(model: Any) -> None:
    recorder = Recorder()
    with GenerationManager(tiny_model("Llama").bfloat16(), BatchingConfig(page_size=16)) as manager:
        manager.submit([5, 6, 7], max_new_tokens=3, do_sample=False, logits_processor=[recorder]).result(60)
    assert {scores.dtype for _, scores in recorder.calls} == {torch.float32}


@pytest.mark.parametrize(
    "arguments",
    [
        # A caller's processor stands between the config's own and the warpers.
        {"logits_processor": [Sure(40)], "suppress_tokens": [40], "forced_eos_token_id": 30},
        {"logits_processor": [Sure(40), MinLengthLogitsProcessor(10, 40)]},
        {"logits_processor": [MinLengthLogitsProcessor(10, 40), Sure(40)], "min_new_tokens": 3},
        # One of the config's own kinds takes its place.
        {"logits_processor": [RepetitionPenaltyLogitsProcessor(3.0)], "repetition_penalty": 1.1},
        {"logits_processor": [RepetitionPenaltyLogitsProcessor(3.0)], "sequence_bias": {(40,): 8.0}},
        {"logits_processor": [RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=5)]},
        # Out of order, and twice.
        {"logits_processor": [RepetitionPenaltyLogitsProcessor(2.0), RepetitionPenaltyLogitsProcessor(3.0)]},
        {"logits_processor": [RepetitionPenaltyLogitsProcessor(2.0)], "suppress_tokens": [41, 42]},
        {"logits_processor": [TemperatureLogitsWarper(0.5)], "do_sample": True, "temperature": 0.5, "top_k": 1},
        {"logits_processor": [TemperatureLogitsWarper(0.5)]},
        {"logits_processor": [TopKLogitsWarper(1)], "do_sample": True, "top_k": 7},
    ],
    ids=named,
)
def test_the_order_is_that_of_generate(model: Any, manager: Any, arguments: dict[str, Any]) -> None:
    arguments = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": [2, 40], "pad_token_id": 0, **arguments}
    arguments["logits_processor"] = LogitsProcessorList(arguments["logits_processor"])
    arguments |= {"return_dict_in_generate": True, "output_scores": True}
    ids = torch.tensor([[5, 9, 7, 9, 8, 6]])
    plain = model.generate(ids, **arguments)
    got = model.generate(ids, **arguments, custom_generate=manager.bind())
    assert torch.equal(got.sequences, plain.sequences)
    for ours, theirs in zip(got.scores, plain.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Panic(BaseException):
    """As errors of native code are that come through pyo3."""


@pytest.mark.parametrize("kind", [RuntimeError, Panic, SystemExit, KeyboardInterrupt])
def test_one_that_raises_ends_its_own_request(manager: Any, model: Any, kind: type[BaseException]) -> None:
    error = kind("no more of this")
    prompts = [[5 + i, 6, 7] for i in range(6)]
    handles = [
        manager.submit(
            prompt, max_new_tokens=12, do_sample=False, eos_token_id=None,
            **({"logits_processor": [Fails(8, error)]} if i == 2 else {}),
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    with pytest.raises(kind, match="no more of this") as caught:
        handles[2].result(60)
    assert caught.value is error
    usual = greedy_alone(model, prompts[2], 12, eos_token_id=None, pad_token_id=0)
    assert handles[2].token_ids == usual[:5], "what was made before is not lost"
    for i, (prompt, handle) in enumerate(zip(prompts, handles, strict=True)):
        if i != 2:
            assert handle.result(60).token_ids == greedy_alone(model, prompt, 12, eos_token_id=None, pad_token_id=0)
    assert manager.stats().running == 0


def test_one_that_raises_in_a_surplus_step_harms_nobody(manager: Any, model: Any) -> None:
    """The request has ended before, with success."""
    tokens = greedy_alone(model, [5, 6, 7], 5, eos_token_id=None, pad_token_id=0)
    end = tokens[-1]
    fails = Fails(3 + tokens.index(end) + 1, RuntimeError("surplus"))
    handle = manager.submit([5, 6, 7], max_new_tokens=40, do_sample=False, eos_token_id=end, logits_processor=[fails])
    assert handle.result(60).token_ids == tokens[: tokens.index(end) + 1]


def test_scores_of_another_shape_are_refused(manager: Any) -> None:
    handle = manager.submit([5, 6], max_new_tokens=3, logits_processor=[lambda ids, scores: scores[:, :5]])
    with pytest.raises(ValueError, match=r"`logits_processor` returned scores of shape \(1, 5\), expected \(1, 97\)"):
        handle.result(60)


def test_a_processor_may_write_to_its_scores(manager: Any, model: Any) -> None:
    """In a step with others, and with the logits themselves to be returned."""

    def write(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores.fill_(-1.0)
        scores[:, 33] = 1.0
        return scores

    other = manager.submit([7, 8], max_new_tokens=5, do_sample=False, eos_token_id=None)
    result = manager.submit(
        [5, 6], max_new_tokens=5, do_sample=False, eos_token_id=None, logits_processor=[write],
        return_dict_in_generate=True, output_logits=True,
    ).result(60)  # fmt: skip
    assert result.token_ids == [33] * 5
    assert all(line.std() > 0.1 for line in result.logits)
    assert other.result(60).token_ids == greedy_alone(model, [7, 8], 5, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_processor_may_follow_gradients(model: Any, manager: Any, do_sample: bool) -> None:
    modes: set[tuple[bool, bool]] = set()

    def guide(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        modes.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        with torch.enable_grad():
            x = scores.clone().requires_grad_(True)
            (model.lm_head.weight[ids[0, -1]].sum() * x.logsumexp(-1)).sum().backward()
        model.zero_grad()
        ids.add_(0)
        return scores - x.grad

    arguments = {"max_new_tokens": 5, "do_sample": do_sample, "eos_token_id": None, "pad_token_id": 0}
    arguments |= {"logits_processor": LogitsProcessorList([guide]), "top_k": 1}
    expected = model.generate(IDS, **arguments)
    assert torch.equal(model.generate(IDS, **arguments, custom_generate=manager.bind()), expected)
    assert modes == {(False, False)}, "as in `generate`"


def test_prefix_functions_get_the_number_of_their_row(model: Any, manager: Any) -> None:
    seen: set[tuple[int, int]] = set()

    def allowed(row: int, tokens: torch.Tensor) -> list[int]:
        seen.add((row, int(tokens[5])))
        return [30 + row]

    out = model.generate(
        IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False, prefix_allowed_tokens_fn=allowed,
        custom_generate=manager.bind(),
    )  # fmt: skip
    assert out[:, 6:].tolist() == [[30] * 4, [31] * 4, [32] * 4]
    assert seen == {(0, 11), (1, 17), (2, 22)}


def test_prefix_functions_get_the_prompts_number_for_each_of_its_sequences(model: Any, manager: Any) -> None:
    def allowed(number: int, tokens: torch.Tensor) -> list[int]:
        return [30 + number, 50 + int(tokens[5])]

    arguments: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 3, "num_return_sequences": 2}
    arguments |= {"do_sample": True, "top_k": 1, "eos_token_id": None, "prefix_allowed_tokens_fn": allowed}
    expected = model.generate(IDS, **arguments)
    assert model.generate(IDS, **arguments, custom_generate=manager.bind()).tolist() == expected.tolist()


def test_nothing_unsatisfiable_passes(manager: Any) -> None:
    handle = manager.submit([5, 6], max_new_tokens=3, prefix_allowed_tokens_fn=lambda row, tokens: [])
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn"):
        handle.result(60)


def test_sampling_draws_from_what_a_processor_leaves(manager: Any) -> None:
    def two(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(scores, float("-inf"))
        out[:, 60], out[:, 61] = 0.0, 1.0
        return out

    handles = [
        manager.submit([5, 6], max_new_tokens=10, do_sample=True, seed=i, eos_token_id=None, logits_processor=[two])
        for i in range(40)
    ]
    tokens = [token for handle in handles for token in handle.result(120).token_ids]
    assert set(tokens) == {60, 61}
    assert 0.66 < tokens.count(61) / len(tokens) < 0.80, "of 400, 0.731 are expected"
