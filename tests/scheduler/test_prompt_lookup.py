"""Where drafts come from."""

from __future__ import annotations

import random
import time

import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from hf_async_batching.scheduler.prompt_lookup import PromptLookup, num_accepted


def find(
    tokens: list[int], limit: int = 100, num_tokens: int = 4, ngram: int = 2, ends: tuple[int, ...] = ()
) -> list[int]:
    return list(PromptLookup(num_tokens, ngram, frozenset(ends)).find(tokens, limit))


def test_what_followed_the_last_tokens_before() -> None:
    assert find([1, 2, 3, 4, 5, 6, 7, 1, 2]) == [3, 4, 5, 6]
    assert find([1, 2, 3, 4, 5, 6, 7, 9, 2]) == [3, 4, 5, 6], "one token, where two have not stood before"
    assert find([1, 2, 3]) == []
    assert find([5]) == []


def test_the_size_of_the_n_grams_does_not_bound_the_work() -> None:
    tokens = [7] * 20_000  # every length of n-gram has stood before
    began = time.perf_counter()
    assert find(tokens, ngram=2**31) == [7] * 4
    assert time.perf_counter() - began < 0.5


def test_longer_n_grams_come_first() -> None:
    tokens = [1, 2, 3, 50, 51, 9, 3, 60, 61, 8, 2, 3, 70, 71, 1, 2, 3]
    assert find(tokens, num_tokens=2, ngram=3) == [50, 51]
    assert find(tokens, num_tokens=2, ngram=2) == [70, 71], "the latest of those that have two behind them"
    assert find(tokens, num_tokens=2, ngram=1) == [70, 71]
    assert find([2, 7, 1, 2], ngram=3) == [7, 1, 2], "an n-gram cannot begin before the first token"


def test_an_n_gram_has_one_token_less_than_the_sequence_at_most() -> None:
    assert find([7, 7, 7, 7], num_tokens=2, ngram=4) == find([7, 7, 7, 7], num_tokens=2, ngram=3) == [7]
    assert find([7, 7, 7, 7], num_tokens=2, ngram=2) == [7, 7]


def test_the_latest_place_with_enough_behind_it() -> None:
    assert find([4, 4, 4, 4, 4, 4], num_tokens=3) == [4, 4, 4]
    assert find([8, 4, 4], num_tokens=3) == [4], "all that there is"
    assert find([1, 2, 10, 11, 1, 2, 20, 21, 1, 2], num_tokens=2) == [20, 21]
    assert find([1, 2, 10, 11, 1, 2, 20, 21, 1, 2], num_tokens=6) == [10, 11, 1, 2, 20, 21]


def test_limits_and_ends() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 1, 2]
    assert find(tokens, limit=2) == [3, 4]
    assert find(tokens, limit=0) == find(tokens, limit=-1) == []
    assert find(tokens, ends=(5,)) == [3, 4]
    assert find(tokens, ends=(3,)) == []


def test_a_sequence_that_grows() -> None:
    rng = random.Random(0)
    tokens = [rng.randrange(5) for _ in range(30)]
    lookup = PromptLookup(4, 3, frozenset())
    for _ in range(300):
        assert list(lookup.find(tokens, 9)) == find(tokens, 9, ngram=3)
        tokens += [rng.randrange(5) for _ in range(rng.randint(1, 3))]


def test_candidates_of_transformers_where_there_is_one_place() -> None:
    """The same draft, but that transformers takes the first of several places."""
    rng, compared = random.Random(0), 0
    for _ in range(300):
        tokens = [rng.randrange(12) for _ in range(rng.randint(2, 20))]
        ngram = rng.randint(1, 3)
        places = [
            sum(tokens[i : i + size] == tokens[-size:] for i in range(len(tokens) - size))
            for size in range(1, ngram + 1)
        ]
        if 1 not in places:
            continue
        theirs = PromptLookupCandidateGenerator(
            eos_token_id=torch.tensor([3]), num_output_tokens=3, max_matching_ngram_size=ngram, max_length=1000
        )
        candidates, _ = theirs.get_candidates(torch.tensor([tokens]))
        if max(size for size, count in enumerate(places) if count) == places.index(1):
            compared += 1
            assert find(tokens, num_tokens=3, ngram=ngram, ends=(3,)) == candidates[0, len(tokens) :].tolist()
    assert compared > 50


def test_rest_after_wrong_drafts() -> None:
    lookup, tokens = PromptLookup(2, 2, frozenset()), [1, 2, 3, 1, 2]
    rests = []
    for _ in range(8):
        lookup.judged(0, 0, len(tokens))
        before = len(tokens)
        while not lookup.find(tokens, 5):
            tokens.append((1, 2, 3)[len(tokens) % 3])
        rests.append(len(tokens) - before)
    assert rests == [1, 2, 4, 8, 16, 32, 32, 32]
    lookup.judged(2, 1, len(tokens))
    assert lookup.find(tokens, 5)
    lookup.judged(2, 0, len(tokens))
    assert not lookup.find(tokens, 5)
    assert lookup.find([*tokens, (1, 2, 3)[len(tokens) % 3]], 5), "it begins anew after a right one"


@pytest.mark.parametrize(("sampled", "accepted"), [([5, 6, 7, 8], 3), ([5, 6, 9, 8], 2), ([9, 6, 7, 8], 0)])
def test_accepted(sampled: list[int], accepted: int) -> None:
    assert num_accepted((5, 6, 7), sampled) == accepted


def test_drafts_become_shorter_until_one_is_right() -> None:
    tokens = list(range(50)) * 3
    lookup = PromptLookup(10, 2, frozenset())

    def next_length(drafted: int, accepted: int) -> int:
        lookup.judged(drafted, accepted, 0)  # so that it has rested by now
        return len(lookup.find(tokens, 100))

    assert len(lookup.find(tokens, 100)) == 10
    assert next_length(10, 3) == 10
    assert [next_length(10, 0) for _ in range(5)] == [5, 2, 1, 1, 1]
    assert next_length(1, 1) == 10
    assert next_length(0, 0) == 10, "there was no draft, which says nothing of their length"


def test_the_latest_occurrence_counts_that_has_just_enough_tokens_after_it() -> None:
    tokens = [9, 5, 9, 6, 7, 9]
    assert PromptLookup(3, 1, frozenset()).find(tokens, 10) == (6, 7, 9)
    assert PromptLookup(4, 1, frozenset()).find(tokens, 10) == (5, 9, 6, 7), "the first one has the most"


def test_one_token_is_a_draft() -> None:
    assert PromptLookup(3, 1, frozenset()).find([9, 5, 9], 1) == (5,)
    assert PromptLookup(3, 1, frozenset()).find([9, 5, 9], 0) == ()
