"""The figures of one sequence: what its steps need, and where its next page and its end are."""

from __future__ import annotations

from typing import Any

import pytest

from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.prefix_keys import shifted_key
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.core.row_layout import RULE_WORDS, Rule, RuleKind
from hf_async_batching.scheduler.sequence import Needs, Sequence

PENALTY = LogitsParams(repetition_penalty=1.2)
TWO_RULES = LogitsParams(rules=(Rule(RuleKind.SUPPRESS, 3), Rule(RuleKind.SUPPRESS, 4)))
NGRAM = LogitsParams(no_repeat_ngram_size=2)
DRAWS = SamplingParams(do_sample=True, top_k=5, logprobs=True)


def sequence(prompt: int = 5, new: int = 9, **changes: Any) -> Sequence:
    return Sequence(Request("a", tuple(range(1, prompt + 1)), new, **changes), 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, 0),
        ({"sampling": DRAWS}, 0),
        ({"output_scores": True}, 0),
        ({"logits": PENALTY}, 3),
        ({"logits": NGRAM, "padding": (0,) * 7}, 7 + 3),
        ({"logits": TWO_RULES, "padding": (0,) * 7}, 7 + 2 * RULE_WORDS + 3),
        ({"chooser": print}, 0),
    ],
    ids=str,
)
def test_a_row_sends_what_its_memory_needs(changes: dict[str, Any], words: int) -> None:
    """Its padding and its rules, and the tokens whose pages it found."""
    assert sequence(**changes).writes(3) == words


def test_most_requests_need_nothing() -> None:
    assert Needs.of(sequence().request) is None
    assert Needs.of(sequence(logits=LogitsParams(renormalize=True)).request) is None, "it moves all scores alike"
    assert Needs.of(sequence(logits=LogitsParams(renormalize=True), output_scores=True).request) is not None


@pytest.mark.parametrize(
    ("changes", "forbids"),
    [
        ({"sampling": DRAWS}, False),
        ({"logits": PENALTY}, True),
        ({"logits": NGRAM}, True),
        ({"logits": LogitsParams(remove_invalid=True)}, True),
        ({"output_scores": True}, True),
        ({"output_logits": True}, True),
        ({"chooser": print}, True),
    ],
    ids=str,
)
def test_what_depends_on_more_than_the_logits_is_not_drafted(changes: dict[str, Any], forbids: bool) -> None:
    made = sequence(lookup_tokens=3, **changes)
    assert made.needs is not None and made.needs.forbids_drafts == forbids
    assert (made.lookup is None) == forbids
    assert sequence(**changes).lookup is None, "no request asked for drafts"
    assert sequence(lookup_tokens=3).lookup is not None
    assert sequence(lookup_tokens=3, prompt_embeddings=object()).lookup is None


def test_a_chooser_does_what_the_engine_would_do() -> None:
    """It draws, filters, ends and keeps minimum lengths itself."""
    given: dict[str, Any] = {"sampling": DRAWS, "eos_token_ids": (7,), "min_new_tokens": 2}
    plain, outside = sequence(**given), sequence(chooser=print, **given)
    assert (plain.has_chooser, plain.eos, plain.min_length, plain.logprobs) == (False, {7}, 7, True)
    assert plain.candidates == DRAWS.candidates
    assert sequence(sampling=SamplingParams()).candidates is None
    assert (outside.has_chooser, outside.eos, outside.min_length, outside.logprobs) == (True, frozenset(), 0, False)
    assert outside.candidates is None
    assert outside.needs is not None and outside.needs.offers and not outside.needs.top_k
    assert outside.needs.stages == 0, "its chooser changes the logits"


def test_a_sequence_that_has_not_started_is_in_no_step() -> None:
    made = sequence()
    assert (made.last_step, made.row, made.num_computed) == (-1, 0, 0)


def test_a_sequence_wants_no_step_for_a_token_beyond_its_length() -> None:
    made = sequence(prompt=5, new=3)
    assert (made.max_length, made.num_planned, made.placeholders) == (8, 5, 0)
    for planned, more in ((6, True), (7, True), (8, False)):
        made.num_planned = planned
        assert (made.placeholders, made.wants_more) == (planned - 5, more)
    for room, page_at in ((6, 6), (7, 7), (8, 7), (12, 7)):
        made.set_next_page(room)
        assert made.next_page_at == page_at, "the last token's keys and values are not written"


def test_the_last_token_may_be_an_end_and_is_not_shared() -> None:
    made = sequence(prompt=5)
    for computed, known, shared in ((3, 5, 3), (5, 5, 5), (6, 6, 5), (6, 7, 6), (9, 7, 6)):
        made.num_computed, made.tokens = computed, list(range(known))
        assert made.num_cacheable == shared


def test_prefix_tokens_follow_the_tokens() -> None:
    """By keys, if the request has some: a completion's tokens lie behind a picture's shift."""
    plain = sequence(3)
    assert plain.prefix_tokens is plain.tokens
    keyed = sequence(3, prompt_embeddings=object(), prefix_keys=(1, -9, -9), position_shifts=(0, -1))
    assert keyed.pages.shareable
    keyed.tokens += [4, 5]
    assert list(keyed.prefix_tokens) == [1, -9, -9, shifted_key(4, (0, -1)), shifted_key(5, (0, -1))]
    keyed.tokens.append(6)
    assert keyed.prefix_tokens[5:] == [shifted_key(6, (0, -1))]
    assert keyed.lookup is None
    assert not sequence(3, prompt_embeddings=object()).pages.shareable
