"""What a step needs follows from its sequences, each need from those that have it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hf_async_batching.core.plan import NO_BOUNDS, Bounds, Features, Run
from hf_async_batching.core.request import CANDIDATE_SIZES, LogitsParams, Request, SamplingParams
from hf_async_batching.core.row_layout import Rule, RuleKind
from hf_async_batching.scheduler.sequence import Sequence
from hf_async_batching.scheduler.step_features import features_of, features_of_request, rare_needs

LARGEST = CANDIDATE_SIZES[-1]
PENALTY = LogitsParams(repetition_penalty=1.2)


def sequence(name: str = "a", computed: int = 5, **changes: Any) -> Sequence:
    made = Sequence(Request(name, (1, 2, 3, 4, 5), 9, **changes), 0)
    made.num_computed = computed
    return made


def drawing(name: str = "a", **sampling: Any) -> Sequence:
    return sequence(name, sampling=SamplingParams(do_sample=True, **sampling))


def test_greedy_rows_need_nothing() -> None:
    assert features_of([sequence()], [sequence()]) == Features()
    assert rare_needs([sequence()]) == ((), (), NO_BOUNDS)


@pytest.mark.parametrize(
    ("top_ks", "wanted"),
    [((0,), 0), ((5, 0), CANDIDATE_SIZES[0]), ((5, LARGEST), LARGEST), ((LARGEST + 1, 5), -1)],
)
def test_the_widest_top_k_decides(top_ks: tuple[int, ...], wanted: int) -> None:
    """One that is larger than all sizes is the widest, though its class is the smallest number."""
    # A penalty makes each row one with needs.
    rows = [sequence(sampling=SamplingParams(do_sample=True, top_k=k), logits=PENALTY) for k in top_ks]
    assert features_of(rows, []).top_k == wanted


def test_the_largest_number_of_candidates_decides() -> None:
    few, more, every = drawing(top_k=5), drawing(top_k=LARGEST), drawing(top_p=0.5)
    sizes = [one.candidates for one in (few, more, every)]
    assert sizes[0] < sizes[1]  # type: ignore[operator]
    assert features_of([few, more], []).candidates == sizes[1]
    assert features_of([more, every, few], []).candidates == (-1 if -1 in sizes else max(sizes))  # type: ignore[type-var]


def test_what_is_kept_is_kept_while_the_prompt_is_computed() -> None:
    """A row's history begins with its first token; its draws begin with its last prompt token."""
    prefilled = sequence(sampling=SamplingParams(do_sample=True, top_k=5), logits=PENALTY)
    features = features_of([], [prefilled])
    assert features.seen
    assert not features.penalty
    assert features.top_k == 0
    assert features_of([prefilled], []).penalty


def test_a_minimum_length_wears_off() -> None:
    assert features_of([sequence(computed=6, min_new_tokens=2)], []).min_length
    assert not features_of([sequence(computed=7, min_new_tokens=2)], []).min_length


def test_a_request_needs_what_its_decode_steps_need() -> None:
    request = sequence(sampling=SamplingParams(do_sample=True, top_k=5, logprobs=True), logits=PENALTY).request
    features = features_of_request(request)
    assert (features.logprobs, features.sampling, features.penalty) == (True, True, True)
    assert features_of_request(replace(request, min_new_tokens=3)).min_length


def test_neighbours_that_want_logits_are_one_run() -> None:
    rows = [
        sequence("a", output_scores=True),
        sequence("b", output_logits=True),
        sequence("c"),
        sequence("d", output_scores=True),
    ]
    assert rare_needs(rows)[1] == (Run(0, 2, ("a", "b")), Run(3, 4, ("d",)))


def test_bounds_are_the_largest_of_the_rows() -> None:
    rules = tuple(Rule(RuleKind.SUPPRESS, token) for token in (3, 4))
    many = sequence("a", computed=7, logits=LogitsParams(rules=rules, no_repeat_ngram_size=2))
    deep = sequence("b", computed=3, logits=LogitsParams(no_repeat_ngram_size=4), padding=(0,) * 6)
    assert rare_needs([many, sequence("c", computed=99), deep])[2] == Bounds(9, 2, 4)


def test_what_is_kept_is_kept_if_any_row_needs_it() -> None:
    plain, repeats = sequence("a", output_scores=True), sequence("b", logits=LogitsParams(no_repeat_ngram_size=2))
    punished = sequence("c", logits=PENALTY)
    assert plain.needs is not None
    assert (features_of([plain, punished], []).seen, features_of([plain], []).seen) == (True, False)
    assert (features_of([plain, repeats], []).memory, features_of([plain], []).memory) == (True, False)


@pytest.mark.parametrize("minimum", [0, 1])
def test_a_request_without_a_minimum_length_is_not_held_back_by_its_prompt(minimum: int) -> None:
    assert features_of_request(sequence(min_new_tokens=minimum).request).min_length == (minimum > 0)
