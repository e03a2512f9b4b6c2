"""Criteria and streamers of a `generate` call: called as `generate` calls them, with the same outcome."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from support.criteria import Raises, RowWise, WholeBatch
from support.recorder import Recorder
from support.tiny_models import EOS, VOCAB, greedy_alone, ragged_prompts, tiny_model
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

import hf_async_batching
from hf_async_batching import BatchingConfig, GenerationManager, UnsupportedArgumentError

CONFIG = BatchingConfig(page_size=16, max_batch_tokens=64, debug=True)
PROMPTS = ragged_prompts(5, 30, seed=3)
ENDS = [EOS, *range(40, 50)]


def padded(prompts: list[list[int]], dtype: torch.dtype = torch.long) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], dtype=dtype)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


INPUTS = padded(PROMPTS)
WIDTH = INPUTS["input_ids"].shape[1]


def both(model: Any, manager: Any, make: Any, **arguments: Any) -> tuple[Any, Any, Any, Any]:
    """The outputs of plain `generate` and of ours, and the criteria that each was given."""
    plain, ours = make(), make()
    arguments = {**INPUTS, "do_sample": False, **arguments}
    expected = model.generate(stopping_criteria=StoppingCriteriaList(plain), **arguments)
    got = model.generate(stopping_criteria=StoppingCriteriaList(ours), custom_generate=manager.bind(), **arguments)
    return expected, got, plain, ours


@pytest.mark.parametrize("eos", [ENDS, None], ids=["eos", "no eos"])
@pytest.mark.parametrize("kind", ["rows", "rows and batch", "batch"])
def test_criteria_are_called_as_generate_calls_them(model: Any, manager: Any, eos: Any, kind: str) -> None:
    def make() -> list[Any]:
        rows = RowWise(set(range(30, 90)), least=3)
        batch = WholeBatch({5, 6, 7, 8, 9}, WIDTH, len(PROMPTS))
        return {"rows": [rows], "rows and batch": [rows, batch], "batch": [batch]}[kind]

    expected, got, plain, ours = both(model, manager, make, max_new_tokens=24, eos_token_id=eos, pad_token_id=0)
    assert torch.equal(got, expected)
    assert got.shape[1] > WIDTH + 4, "nothing to see"
    for one, other in zip(plain, ours, strict=True):
        assert one.calls == other.calls
        assert vars(one) == vars(other)
    if kind == "rows" and eos is not None:
        assert any(row[-1] == 0 for row in ours[0].calls[-1][0]), "no finished row was filled up"
    if kind != "batch":
        assert got.shape[1] < WIDTH + 24, "the criterion stopped nothing"


def test_rows_that_have_finished_go_on_without_an_end_token(model: Any, manager: Any) -> None:
    """`generate` fills finished rows up only where there is an end-of-sequence criterion."""
    expected, got, *_ = both(
        model, manager, lambda: [RowWise(set(range(50, 80)))], max_new_tokens=24, eos_token_id=None, pad_token_id=None
    )
    assert torch.equal(got, expected)


def test_a_criterion_may_write_to_what_it_is_given(model: Any, manager: Any) -> None:
    class Scribbles(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            input_ids[:, 0] = input_ids.shape[1] % 90
            return torch.zeros(len(input_ids), dtype=torch.bool)

    expected, got, *_ = both(model, manager, lambda: [Scribbles()], max_new_tokens=6, eos_token_id=None)
    assert torch.equal(got[:, WIDTH:], expected[:, WIDTH:])


def test_int32_prompts_give_what_generate_gives(model: Any, manager: Any) -> None:
    inputs = padded(PROMPTS, torch.int32)
    for criteria in ([], [RowWise(set())]):
        expected, got, plain, ours = both(
            model, manager, lambda kept=criteria: [RowWise(set()) for _ in kept], max_new_tokens=5, **inputs
        )
        assert torch.equal(got, expected) and got.dtype == expected.dtype
        assert [one.calls for one in plain] == [one.calls for one in ours]


@pytest.mark.parametrize(
    "make",
    [
        lambda: [EosTokenCriteria([44, 45, 46, 47, 48, 49, 50, 51])],
        lambda: [MaxLengthCriteria(WIDTH + 7)],
        lambda: [MaxLengthCriteria(WIDTH + 20)],
        lambda: [MaxLengthCriteria(3)],
        lambda: [MaxTimeCriteria(0.0)],
        lambda: [MaxTimeCriteria(1e9)],
        lambda: [EosTokenCriteria([60]), EosTokenCriteria([61, 62, 63]), RowWise({7, 8})],
    ],
    ids=["eos", "shorter", "longer than the config", "shorter than the prompt", "no time", "much time", "several"],
)
def test_criteria_of_transformers_take_the_place_of_the_configs(model: Any, manager: Any, make: Any) -> None:
    expected, got, *_ = both(model, manager, make, max_new_tokens=14, eos_token_id=ENDS, pad_token_id=0)
    assert torch.equal(got, expected)


def test_other_ends_and_a_least_length_are_refused_together(model: Any, manager: Any) -> None:
    with pytest.raises(UnsupportedArgumentError, match=r"EosTokenCriteria.*`eos_token_id`"):
        model.generate(
            **INPUTS,
            min_new_tokens=3,
            max_new_tokens=9,
            stopping_criteria=StoppingCriteriaList([EosTokenCriteria(11)]),
            custom_generate=manager.bind(),
        )
    with pytest.raises(ValueError, match="`pad_token_id`"):
        model.generate(
            **INPUTS,
            max_new_tokens=9,
            eos_token_id=None,
            pad_token_id=None,
            stopping_criteria=StoppingCriteriaList([EosTokenCriteria(11)]),
            custom_generate=manager.bind(),
        )


@pytest.mark.parametrize("max_time", [0.0, 1e9])
def test_max_time(model: Any, manager: Any, max_time: float) -> None:
    arguments = {**INPUTS, "max_time": max_time, "max_new_tokens": 9, "do_sample": False}
    got = model.generate(custom_generate=manager.bind(), **arguments)
    assert torch.equal(got, model.generate(**arguments))
    assert got.shape[1] == WIDTH + (1 if max_time == 0 else 9)


def test_max_time_ends_a_long_call(model: Any, manager: Any) -> None:
    started = time.monotonic()
    out = model.generate(
        torch.tensor([[5, 6, 7]]), max_time=0.3, max_new_tokens=480, eos_token_id=None, custom_generate=manager.bind()
    )
    assert time.monotonic() - started < 20
    assert 1 <= out.shape[1] - 3 <= 480


@pytest.mark.parametrize("eos", [ENDS, None], ids=["eos", "no eos"])
@pytest.mark.parametrize("least", [3, 99], ids=["stopped", "not stopped"])
def test_criteria_see_the_scores_where_they_are_returned(model: Any, manager: Any, eos: Any, least: int) -> None:
    """Those of rows that have finished are 0 here, and what the model says after padding in `generate`."""

    class Scores(RowWise):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.seen = [*getattr(self, "seen", []), scores]
            assert isinstance(scores, tuple) and scores[-1].shape == (len(PROMPTS), VOCAB)
            return super().__call__(input_ids, None)

    returned = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, got, (plain,), (ours,) = both(
        model,
        manager,
        lambda: [Scores(set(range(30, 90)), least)],
        max_new_tokens=12,
        repetition_penalty=1.3,
        eos_token_id=eos,
        pad_token_id=0,
        **returned,
    )
    assert torch.equal(got.sequences, expected.sequences)
    assert plain.calls == ours.calls
    assert len(ours.seen[-1]) == len(ours.seen) == len(got.scores) == len(got.logits) == len(expected.scores)
    zeros = 0
    for step, (mine, his) in enumerate(zip(ours.seen[-1], plain.seen[-1], strict=True)):
        assert torch.equal(mine, got.scores[step])
        for row in range(len(PROMPTS)):
            if mine[row].any():
                torch.testing.assert_close(mine[row], his[row], atol=1e-3, rtol=1e-3)
                torch.testing.assert_close(got.logits[step][row], expected.logits[step][row], atol=1e-3, rtol=1e-3)
            else:
                zeros += 1
                assert got.sequences[row, WIDTH + step] == 0 and eos is not None
    assert (zeros > 0) == (eos is not None)


# -- stop strings -------------------------------------------------------------------------------------------------


def texts(tokenizer: Any, model: Any, count: int) -> list[str]:
    return [tokenizer.decode(greedy_alone(model, prompt, count, eos_token_id=None)) for prompt in PROMPTS]


def call(way: str, model: Any, manager: Any, tokenizer: Any, **arguments: Any) -> torch.Tensor:
    if way == "bound":
        return model.generate(custom_generate=manager.bind(tokenizer=tokenizer), **arguments)
    if way == "argument":
        return model.generate(custom_generate=manager.bind(), tokenizer=tokenizer, **arguments)
    if way == "criterion":
        strings = arguments.pop("stop_strings")
        criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, strings)])
        return model.generate(custom_generate=manager.bind(), stopping_criteria=criteria, **arguments)
    return hf_async_batching.generate(model, manager=manager, tokenizer=tokenizer, **arguments)


@pytest.mark.parametrize("eos", [ENDS, None], ids=["eos", "no eos"])
@pytest.mark.parametrize("way", ["bound", "argument", "criterion", "direct"])
def test_stop_strings(model: Any, manager: Any, tokenizer: Any, way: str, eos: Any) -> None:
    made = texts(tokenizer, model, 20)
    # From the middle of each text, three letters: two tokens at least.
    strings = [text[10:13] for text in made]
    arguments = {**INPUTS, "stop_strings": strings, "max_new_tokens": 20, "do_sample": False, "eos_token_id": eos}
    arguments["pad_token_id"] = 0
    expected = model.generate(tokenizer=tokenizer, **arguments)
    got = call(way, model, manager, tokenizer, **arguments)
    assert torch.equal(got, expected)
    assert got.shape[1] < WIDTH + 20
    together = call(
        way,
        model,
        manager,
        tokenizer,
        **arguments,
        **({} if way == "criterion" else {"stopping_criteria": StoppingCriteriaList([RowWise(set())])}),
    )
    assert torch.equal(together, expected)


def test_stop_strings_in_a_config(model: Any, manager: Any, tokenizer: Any) -> None:
    """Of the call, and of the model; in place transformers itself demands the tokenizer that it then drops."""
    string = texts(tokenizer, model, 20)[1][10:13]
    ids = torch.tensor([PROMPTS[1]])
    expected = model.generate(
        ids, stop_strings=string, tokenizer=tokenizer, max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    config = GenerationConfig(stop_strings=string, max_new_tokens=20, do_sample=False, pad_token_id=0)
    before = config.to_dict()
    of_model = tiny_model("Llama")
    of_model.generation_config.eos_token_id = None
    direct = hf_async_batching.generate
    with GenerationManager(of_model, CONFIG) as other:
        got = direct(of_model, ids, generation_config=config, tokenizer=tokenizer, manager=other)
        assert torch.equal(got, expected) and got.shape[1] < len(PROMPTS[1]) + 20
        assert config.to_dict() == before
        with pytest.raises(ValueError, match="tokenizer"):
            direct(of_model, ids, generation_config=config, manager=other)
        of_model.generation_config.stop_strings = [string]
        got = direct(of_model, ids, tokenizer=tokenizer, max_new_tokens=20, do_sample=False, manager=other)
        assert torch.equal(got, expected)
        assert of_model.generation_config.stop_strings == [string]
        with pytest.raises(ValueError, match="tokenizer"):
            of_model.generate(ids, max_new_tokens=20, custom_generate=other.bind(tokenizer=tokenizer))


def test_stop_strings_need_a_tokenizer(model: Any, manager: Any) -> None:
    with pytest.raises(ValueError, match="`stop_strings` needs the model's tokenizer"):
        model.generate(**INPUTS, stop_strings="ab", max_new_tokens=3, custom_generate=manager.bind())
    with pytest.raises(ValueError, match="`stop_strings` needs the model's tokenizer"):
        hf_async_batching.generate(model, **INPUTS, stop_strings="ab", max_new_tokens=3, manager=manager)


# -- failures, and others -----------------------------------------------------------------------------------------


def test_a_criterion_that_raises_reaches_its_caller_alone(model: Any, manager: Any) -> None:
    innocent = manager.submit(PROMPTS[1], max_new_tokens=60, do_sample=False, eos_token_id=None)
    with pytest.raises(ZeroDivisionError, match="the criterion's own mistake"):
        model.generate(
            **INPUTS,
            max_new_tokens=400,
            eos_token_id=None,
            stopping_criteria=StoppingCriteriaList([Raises(3)]),
            custom_generate=manager.bind(),
        )
    assert innocent.result(60).token_ids == greedy_alone(model, PROMPTS[1], 60, eos_token_id=None)
    deadline = time.monotonic() + 60
    while manager.stats().rows_in_use:
        assert time.monotonic() < deadline, "rows of the failed call go on"
        time.sleep(0.01)


def test_the_engine_does_not_wait_for_a_criterion(model: Any, manager: Any) -> None:
    entered, release = threading.Event(), threading.Event()
    seen: list[threading.Thread] = []

    class Stuck(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(threading.current_thread())
            entered.set()
            assert release.wait(60)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    out: list[torch.Tensor] = []
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    criteria = StoppingCriteriaList([Stuck()])
    caller = threading.Thread(
        target=lambda: out.append(
            model.generate(**INPUTS, **arguments, stopping_criteria=criteria, custom_generate=manager.bind())
        )
    )
    caller.start()
    assert entered.wait(60)
    other = manager.submit(PROMPTS[2], max_new_tokens=30, do_sample=False, eos_token_id=None).result(60).token_ids
    assert other == greedy_alone(model, PROMPTS[2], 30, eos_token_id=None)
    release.set()
    caller.join(60)
    assert torch.equal(out[0], model.generate(**INPUTS, **arguments))
    assert set(seen) == {caller}


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_streamers_see_no_token_beyond_the_stop(model: Any, manager: Any, rows: int, stopped: bool) -> None:
    expected, got = Recorder(), Recorder()
    arguments: dict[str, Any] = {name: value[-rows:] for name, value in INPUTS.items()}
    arguments |= {"max_new_tokens": 24, "do_sample": False, "eos_token_id": ENDS, "pad_token_id": 0}

    def criteria() -> StoppingCriteriaList:
        return StoppingCriteriaList([RowWise(set(range(60, 80)), least=3)] if stopped else [])

    first = model.generate(streamer=expected, stopping_criteria=criteria(), **arguments)
    for plug in (manager.bind(), manager.bind(streamer=got)):
        got.calls.clear()
        given = {} if plug.keywords["bound"].streamer is got else {"streamer": got}
        second = model.generate(custom_generate=plug, stopping_criteria=criteria(), **given, **arguments)
        assert torch.equal(first, second)
        assert got.calls == expected.calls
    if stopped:
        assert len(got.calls) < 24 + 2
