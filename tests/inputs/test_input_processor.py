"""What `submit` and `generate` make of the same arguments is the same request; no engine runs here."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny_models import EOS, tiny_model
from transformers.generation import EosTokenCriteria, LogitsProcessorList, MaxTimeCriteria, StoppingCriteriaList
from transformers.generation.logits_process import LogitsProcessor

from hf_async_batching import UnsupportedArgumentError
from hf_async_batching.core.request import Request
from hf_async_batching.inputs.input_processor import BatchRequests, InputProcessor, known_arguments
from hf_async_batching.inputs.prompts import Prompt
from hf_async_batching.manager import GenerationManager
from hf_async_batching.sampling.sampler import seed_records
from hf_async_batching.stopping.criteria import read_criteria

PROMPT = [5, 6, 7, 5, 6]


class Plain(LogitsProcessor):
    """Leaves scores as they are; sees the whole batch."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


class RowWise(Plain):
    row_wise = True


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama")


@pytest.fixture
def inputs(model: Any) -> InputProcessor:
    return InputProcessor(lambda: model, lambda: model)


def batch(inputs: InputProcessor, model: Any, prompts: list[list[int]], holds: bool = True, **arguments: Any) -> Any:
    """What the drop-in makes of a call: requests, and a chooser for all rows."""
    seed = arguments.pop("seed", 3)

    def plug(model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, **rest: Any) -> BatchRequests:
        stops, config = read_criteria(stopping_criteria), rest["generation_config"]
        return inputs.read_batch(
            [Prompt(list(row), list(row)) for row in input_ids.tolist()],
            config,
            logits_processor,
            input_ids,
            seeds=[seed] * len(input_ids),
            max_new_tokens=max(1, int(stops.max_length) - input_ids.shape[1]),
            eos=stops.eos,
            holds_group=lambda requests: holds,
        )

    given = {"pad_token_id": 0, **arguments}
    return model.generate(input_ids=torch.tensor(prompts), custom_generate=plug, **given)


ALIKE: list[dict[str, Any]] = [
    {"max_new_tokens": 7},
    {"max_length": 11},
    {},
    {"max_new_tokens": 7, "eos_token_id": [3, 9]},
    {"max_new_tokens": 7, "eos_token_id": None},
    {"max_new_tokens": 7, "min_new_tokens": 3},
    {"max_new_tokens": 7, "min_length": 8},
    {"max_new_tokens": 7, "min_length": 8, "min_new_tokens": 2},
    {"max_new_tokens": 7, "repetition_penalty": 1.3},
    {"max_new_tokens": 7, "encoder_repetition_penalty": 1.3},
    {"max_new_tokens": 7, "no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 2},
    {"max_new_tokens": 7, "forced_eos_token_id": 9, "suppress_tokens": [4, 8], "begin_suppress_tokens": [7]},
    {"max_new_tokens": 7, "bad_words_ids": [[4], [5, 6]], "sequence_bias": [[[7, 8], -2.0]]},
    {"max_new_tokens": 7, "exponential_decay_length_penalty": (2, 1.1), "remove_invalid_values": True},
    {"max_new_tokens": 7, "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    {"max_new_tokens": 7, "do_sample": True, "top_k": 0, "typical_p": 0.9, "renormalize_logits": True},
    {"max_new_tokens": 7, "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    {"max_new_tokens": 7, "output_scores": True},
    {"max_new_tokens": 7, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2},
]


@pytest.mark.parametrize("arguments", ALIKE, ids=str)
def test_both_ways_in_make_the_same_request(inputs: InputProcessor, model: Any, arguments: dict[str, Any]) -> None:
    given = {"do_sample": False, **arguments}
    submitted = inputs.read_submission(PROMPT, None, seed=3, **given)
    got = batch(inputs, model, [PROMPT], **given)
    assert got.chooser is None and not submitted.criteria and submitted.history == PROMPT
    (row,) = got.requests
    assert replace(row, request_id="") == replace(submitted.request, request_id="")
    assert row.request_id != submitted.request.request_id


@pytest.mark.parametrize("sampled", [False, True])
def test_both_ways_in_call_what_they_cannot_read(inputs: InputProcessor, model: Any, sampled: bool) -> None:
    own = LogitsProcessorList([Plain()])
    given = {"max_new_tokens": 4, "do_sample": sampled, "logits_processor": own}
    given |= {"output_logits": True, "return_dict_in_generate": True}
    request = inputs.read_submission(PROMPT, None, seed=3, logprobs=True, **given).request
    chooser: Any = request.chooser
    assert request.group is None and request.sampling.logprobs
    assert (request.sampling.do_sample, request.sampling.seed) == (sampled, 3 if sampled else 0)
    assert chooser.prompt.tolist() == [PROMPT] and chooser.processors[-1 if not sampled else 0] is own[0]
    got = batch(inputs, model, [PROMPT, PROMPT[::-1]], **given)
    assert got.chooser is got.requests[0].chooser is got.requests[1].chooser
    assert got.requests[0].group == got.requests[1].group is not None
    assert got.chooser.prompt.tolist() == [PROMPT, PROMPT[::-1]]
    logits = torch.randn(1, model.config.vocab_size)
    chosen = chooser(torch.tensor([PROMPT]), logits.clone())
    assert chosen.logprobs is not None and torch.equal(chosen.logits, logits)
    both = got.chooser(got.chooser.prompt, logits.repeat(2, 1))
    assert both.logprobs is None and both.tokens[0] == chosen.tokens[0], "one seed and one length draw the same"


@pytest.mark.parametrize(
    ("processor", "holds", "alone"), [(RowWise, True, True), (RowWise, False, True), (Plain, False, False)]
)
def test_rows_of_row_wise_processors_go_alone(
    inputs: InputProcessor, model: Any, processor: Any, holds: bool, alone: bool
) -> None:
    own = LogitsProcessorList([processor()])
    got = batch(inputs, model, [PROMPT, PROMPT[::-1]], holds, max_new_tokens=4, do_sample=False, logits_processor=own)
    choosers: list[Any] = [request.chooser for request in got.requests]
    assert (got.chooser is None) == alone == (choosers[0] is not choosers[1])
    if alone:
        assert [chooser.prompt.tolist() for chooser in choosers] == [[PROMPT], [PROMPT[::-1]]]
        assert all(request.group is None for request in got.requests)


def test_transformers_own_rows_go_alone_only_where_the_engine_does_not_hold_them(
    inputs: InputProcessor, model: Any
) -> None:
    """More tokens are suppressed than parameters hold."""
    given = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": list(range(10, 90)) * 4}
    assert batch(inputs, model, [PROMPT, PROMPT], True, **given).chooser is not None
    assert batch(inputs, model, [PROMPT, PROMPT], False, **given).chooser is None


@pytest.mark.filterwarnings("ignore::UserWarning")  # of transformers, which bounds it
def test_a_minimum_beyond_the_maximum(inputs: InputProcessor, model: Any) -> None:
    """`generate` warns and goes up to the maximum; `submit` refuses."""
    given = {"max_new_tokens": 4, "min_new_tokens": 6, "do_sample": False}
    with pytest.raises(ValueError, match="min_new_tokens"):
        inputs.read_submission(PROMPT, None, **given)
    assert batch(inputs, model, [PROMPT], **given).requests[0].min_new_tokens == 4


def test_submit_knows_its_arguments(inputs: InputProcessor) -> None:
    with pytest.raises(TypeError, match=r"does not have: \['attention_mask'\]"):
        inputs.read_submission(PROMPT, None, attention_mask=torch.ones(1, 5))
    with pytest.raises(UnsupportedArgumentError, match="num_return_sequences"):
        inputs.read_submission(PROMPT, None, num_return_sequences=2, do_sample=True)
    of_handle = {"cancel_on_abandon"}
    taken = set(inspect.signature(GenerationManager.submit).parameters) - {"self", "generate_arguments"} - of_handle
    given = dict.fromkeys(taken - {"input_ids", "generation_config", "logprobs"})
    assert inputs.read_submission(PROMPT, None, **given).request.prompt == tuple(PROMPT)


def test_lengths_count_the_prompt_only_where_they_are_given(inputs: InputProcessor, model: Any) -> None:
    config = model.generation_config.__class__(max_length=12)
    assert inputs.read_submission(PROMPT, config).request.max_new_tokens == 7
    assert inputs.read_submission(PROMPT, None).request.max_new_tokens == 20
    assert inputs.read_submission(PROMPT, config, max_length=9).request.max_new_tokens == 4
    assert inputs.read_submission(PROMPT, config, max_new_tokens=2).request.max_new_tokens == 2


def test_criteria_beside_the_engine(inputs: InputProcessor) -> None:
    own = StoppingCriteriaList([MaxTimeCriteria(5.0)])
    made = inputs.read_submission(PROMPT, None, max_time=3.0).criteria
    assert [criterion.max_time for criterion in made] == [3.0]
    assert list(inputs.read_submission(PROMPT, None, max_time=3.0, stopping_criteria=own).criteria) == list(own)
    with pytest.raises(ValueError, match="tokenizer"):
        inputs.read_submission(PROMPT, None, stop_strings=["x"])


@pytest.mark.filterwarnings("ignore::UserWarning")  # of transformers, on penalties without a prompt
def test_prompts_of_embeddings(inputs: InputProcessor) -> None:
    embeddings = torch.randn(5, 8, requires_grad=True)
    alone = inputs.read_submission(None, None, inputs_embeds=embeddings, max_new_tokens=3)
    beside = inputs.read_submission(PROMPT, None, inputs_embeds=embeddings, max_length=8, repetition_penalty=1.2)
    assert alone.history == [] and alone.request.prompt == (0,) * 5
    assert beside.history == PROMPT and beside.request.max_new_tokens == 3
    for request in (alone.request, beside.request):
        given: Any = request.prompt_embeddings
        assert torch.equal(given, embeddings) and not given.requires_grad
        assert given.data_ptr() != embeddings.data_ptr(), "a copy: the caller may write to its own"
    with pytest.raises(UnsupportedArgumentError, match="history has no prompt"):
        inputs.read_submission(None, None, inputs_embeds=embeddings, repetition_penalty=1.2)
    for wrong, text in (
        ({"input_ids": None}, "needs `input_ids` or"),
        ({"input_ids": [1, 2], "inputs_embeds": embeddings}, "5 positions and `input_ids` 2 tokens"),
        ({"input_ids": None, "inputs_embeds": embeddings[None]}, r"must be a tensor \[length, hidden\]"),
        ({"input_ids": None, "inputs_embeds": [1.0]}, "got list"),
    ):
        with pytest.raises(ValueError, match=text):
            inputs.read_submission(generation_config=None, **wrong)  # type: ignore[arg-type]


def test_the_models_own_way_of_drawing(model: Any) -> None:
    inputs = InputProcessor(lambda: model, lambda: model)
    assert inputs.default_request() is None
    before = model.generation_config.repetition_penalty
    try:
        model.generation_config.repetition_penalty = 1.4
        request = inputs.default_request()
    finally:
        model.generation_config.repetition_penalty = before
    assert isinstance(request, Request) and request.logits.repetition_penalty == 1.4
    assert not request.sampling.logprobs, "most requests want none"
    assert request.eos_token_ids == (EOS,) and request.max_new_tokens == 1


def test_ends_of_the_criteria_take_the_place_of_the_configs(inputs: InputProcessor, model: Any) -> None:
    given = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": [3, 9]}
    own = StoppingCriteriaList([EosTokenCriteria([7])])
    (request,) = batch(inputs, model, [PROMPT], stopping_criteria=own, **given).requests
    assert request.eos_token_ids == (7,)
    (request,) = batch(
        inputs, model, [PROMPT], stopping_criteria=StoppingCriteriaList([EosTokenCriteria([9, 3])]), **given
    ).requests
    assert request.eos_token_ids == (3, 9), "the same tokens"


def test_each_row_that_goes_alone_has_its_own_seed_and_length(model: Any) -> None:
    inputs = InputProcessor(lambda: model, lambda: model)
    config = model.generation_config.__class__(do_sample=True)
    config._eos_token_tensor = None
    prompts = [Prompt([0, *PROMPT[:size]], PROMPT[:size]) for size in (5, 3, 4)]
    got = inputs.read_batch(
        prompts,
        config,
        LogitsProcessorList([RowWise()]),
        torch.tensor([PROMPT] * 3),
        seeds=[11, 22, 33],
        max_new_tokens=4,
        eos=(),
        holds_group=lambda requests: True,
    )
    choosers: list[Any] = [request.chooser for request in got.requests]
    assert [chooser._positions.tolist() for chooser in choosers] == [[len(prompt.tokens)] for prompt in prompts]
    assert [chooser.prompt.tolist() for chooser in choosers] == [[PROMPT]] * 3
    for seed, chooser in zip((11, 22, 33), choosers, strict=True):
        assert torch.equal(chooser._records, seed_records([seed], torch.device("cpu")))


def test_other_ends_do_not_go_with_a_minimum_length(inputs: InputProcessor, model: Any) -> None:
    own = StoppingCriteriaList([EosTokenCriteria([7])])
    given = {"max_new_tokens": 4, "min_new_tokens": 2, "do_sample": False, "eos_token_id": [3]}
    with pytest.raises(UnsupportedArgumentError, match="EosTokenCriteria has other tokens"):
        batch(inputs, model, [PROMPT], stopping_criteria=own, **given)


def test_a_submission_is_checked_by_the_table(inputs: InputProcessor) -> None:
    with pytest.raises(UnsupportedArgumentError, match="`num_beams=2` is not served"):
        inputs.read_submission(PROMPT, None, num_beams=2)
    with pytest.raises(TypeError, match="`max_time` must be a number"):
        inputs.read_submission(PROMPT, None, max_time="3")
    sizes = (len(PROMPT) + 1, 1000)
    read = [inputs.read_submission(PROMPT, None, encoder_no_repeat_ngram_size=size).request.logits for size in sizes]
    assert read[0] == read[1], "no n-gram is longer than the prompt"
    assert inputs.read_submission(PROMPT, None, num_return_sequences=None).request.prompt == tuple(PROMPT)


def test_known_arguments_are_those_that_have_names(inputs: InputProcessor) -> None:
    known = known_arguments()
    assert {"seed", "logprobs", "max_new_tokens", "logits_processor"} <= {*known}
    assert not {"self", "input_ids", "generation_config", "arguments"} & {*known}


@pytest.mark.parametrize(("returned", "asked"), [(True, True), (True, False), (False, True)])
def test_choosers_return_logits_if_a_dict_does(inputs: InputProcessor, returned: bool, asked: bool) -> None:
    own = LogitsProcessorList([Plain()])
    given = {"return_dict_in_generate": returned, "output_logits": asked, "logits_processor": own}
    chooser: Any = inputs.read_submission(PROMPT, None, **given).request.chooser
    assert chooser._logits == (returned and asked)
