"""Seeds, sampling bounds and end tokens, exactly at their bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from hf_async_batching.core.request import MAX_SEED, Request, SamplingParams
from hf_async_batching.inputs.logits_processors import SamplingSpec
from hf_async_batching.inputs.request_builder import build_request, eos_token_ids, new_request_id, seeds_of_rows


def built(new: float = 5, **fields: Any) -> Request:
    config = GenerationConfig(do_sample=True)
    for name, value in fields.items():
        setattr(config, name, value)
    return build_request([5, 6], config, SamplingSpec(SamplingParams()), max_new_tokens=new)


@pytest.mark.parametrize("seed", [0, 1, MAX_SEED - 1, np.int64(0), torch.tensor(0)])
def test_seeds_in_range(seed: Any) -> None:
    assert seeds_of_rows(seed, 1) == seeds_of_rows([seed], 1) == [int(seed)]


@pytest.mark.parametrize("seed", [-1, MAX_SEED])
def test_seeds_out_of_range(seed: int) -> None:
    for given in (seed, [0, seed]):
        with pytest.raises(ValueError, match=r"`seed` must be in \[0, 2\*\*63\)"):
            seeds_of_rows(given, 2)


def test_rows_of_one_seed_differ_and_stay_in_range() -> None:
    for seed in (0, MAX_SEED - 1):
        seeds = seeds_of_rows(seed, 100)
        assert seeds[0] == seed and len(set(seeds)) == 100
        assert all(0 <= one < MAX_SEED for one in seeds)
        assert seeds[:7] == seeds_of_rows(seed, 7), "a row's seed does not depend on the rows after it"


def test_a_seed_per_row_for_as_many_rows() -> None:
    for given in ([3, 4], (3, 4), np.array([3, 4]), torch.tensor([3, 4])):
        assert seeds_of_rows(given, 2) == [3, 4]
    for given in ([3], [3, 4, 5]):
        with pytest.raises(ValueError, match=rf"`seed` has {len(given)} entries for 2 sequences"):
            seeds_of_rows(given, 2)
    with pytest.raises(TypeError, match="`seed` must be an integer"):
        seeds_of_rows("34", 2)


def test_seeds_without_a_seed_and_of_a_generator() -> None:
    drawn = seeds_of_rows(None, 5)
    assert len(set(drawn)) == 5 and all(0 <= one < MAX_SEED for one in drawn)
    first, second = (seeds_of_rows(torch.Generator().manual_seed(3), 3) for _ in range(2))
    assert first == second and len(set(first)) == 3
    generator = torch.Generator().manual_seed(3)
    assert seeds_of_rows([generator, generator], 2)[0] == first[0]


@pytest.mark.parametrize("top_p", [None, 0.0, 0.5, 1.0, 1])
def test_top_p_within_its_bounds(top_p: Any) -> None:
    assert built(top_p=top_p).prompt == (5, 6)


@pytest.mark.parametrize("top_p", [-0.01, 1.01])
def test_top_p_beyond_its_bounds(top_p: float) -> None:
    with pytest.raises(ValueError, match=r"`top_p` must be in \[0, 1\]"):
        built(top_p=top_p)
    assert built(top_p=top_p, do_sample=False).prompt == (5, 6), "no token is drawn"


@pytest.mark.parametrize(("given", "steps"), [(5, 5), (4.2, 5), (5.0, 5)])
def test_a_fraction_of_a_token_is_a_token(given: float, steps: int) -> None:
    assert built(given).max_new_tokens == steps


@pytest.mark.parametrize(
    ("returned", "asked", "expected"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_scores_and_logits_are_kept_if_a_dict_returns_them(returned: bool, asked: bool, expected: bool) -> None:
    request = built(return_dict_in_generate=returned, output_scores=asked, output_logits=False)
    assert (request.output_scores, request.output_logits) == (expected, False)
    request = built(return_dict_in_generate=returned, output_scores=False, output_logits=asked)
    assert (request.output_scores, request.output_logits) == (False, expected)


def test_lookups_have_at_least_one_token() -> None:
    request = built(prompt_lookup_num_tokens=1, max_matching_ngram_size=1)
    assert (request.lookup_tokens, request.lookup_ngram) == (1, 1)
    assert (built().lookup_tokens, built().lookup_ngram) == (0, 2)
    for name in ("prompt_lookup_num_tokens", "max_matching_ngram_size"):
        for value in (0, 1.0):
            with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1"):
                built(**{name: value})


@pytest.mark.parametrize("token", [-MAX_SEED, -1, 0, MAX_SEED - 1])
def test_ends_of_64_bits(token: int) -> None:
    config = GenerationConfig()
    for given, expected in ((token, (token,)), ([token, 3], (token, 3)), (torch.tensor([token]), (token,))):
        config.eos_token_id = given
        assert eos_token_ids(config) == expected


@pytest.mark.parametrize(("token", "error"), [(-MAX_SEED - 1, ValueError), (MAX_SEED, ValueError), (2.0, TypeError)])
def test_ends_that_are_no_tokens(token: Any, error: type[Exception]) -> None:
    config = GenerationConfig()
    config.eos_token_id = [3, token]
    with pytest.raises(error, match="`eos_token_id` must"):
        eos_token_ids(config)


def test_ids_are_the_callers_or_new() -> None:
    assert len({new_request_id() for _ in range(5)}) == 5
    config = GenerationConfig()
    for given in ("mine", None):
        spec = SamplingSpec(SamplingParams())
        request = build_request([5], config, spec, max_new_tokens=1, request_id=given)
        assert request.request_id == given or (given is None and request.request_id.startswith("req-"))


def test_seeds_stay_the_same_from_release_to_release() -> None:
    """A caller gets the same draws again with a newer version."""
    assert seeds_of_rows(0, 3) == [0, 5700357409661599243, 2177342782468422678]
    generator = torch.Generator().manual_seed(3)
    assert [seeds_of_rows(generator, 1)[0] for _ in range(2)] == [937055941807507097, 3839649608876091012]
