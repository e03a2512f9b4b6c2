"""Requests and sampling parameters: what they refuse, and how many candidates their filters need."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from hf_async_batching.core.request import Request, SamplingParams


@pytest.mark.parametrize(
    ("field", "bad", "good"),
    [
        ("temperature", (0.0, -1.0, math.inf, math.nan), (1e-3, 1.0, 100.0)),
        ("top_k", (-1,), (0, 1, 10**6)),
        ("top_p", (-0.1, 1.1, math.nan), (0.0, 1e-6, 0.5, 1.0)),
        ("min_p", (-0.1, 1.1, math.nan), (0.0, 0.5, 1.0)),
        ("seed", (-1, 2**63), (0, 2**63 - 1)),
    ],
)
def test_ranges_of_sampling_parameters(field: str, bad: tuple[float, ...], good: tuple[float, ...]) -> None:
    for value in bad:
        with pytest.raises(ValueError, match=f"`{field}` must be"):
            SamplingParams(**{field: value})  # type: ignore[arg-type]
    for value in good:
        assert getattr(SamplingParams(**{field: value}), field) == value  # type: ignore[arg-type]


def test_temperature_zero_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="do_sample=False"):
        SamplingParams(temperature=0.0)


@pytest.mark.parametrize(
    ("fields", "candidates"),
    [
        ({}, 0),
        ({"temperature": 0.5}, 0),
        ({"top_k": 1}, 64),
        ({"top_k": 64}, 64),
        ({"top_k": 65}, 1024),
        ({"top_k": 1024}, 1024),
        ({"top_k": 1025}, -1),
        ({"top_p": 0.9}, -1),
        ({"top_k": 50, "top_p": 0.9}, 64),
        ({"top_k": 500, "top_p": 0.9, "min_p": 0.1}, 1024),
        ({"top_k": 2000, "top_p": 0.9}, -1),
        ({"min_p": 0.1}, 64),
        ({"min_p": 0.1, "top_p": 0.9}, -1),
    ],
    ids=str,
)
def test_candidates(fields: dict[str, Any], candidates: int) -> None:
    assert SamplingParams(do_sample=True, **fields).candidates == candidates


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ()}, "`input_ids` is empty"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0; .*above the prompt's 3 tokens"),
        ({"max_new_tokens": -4}, "`max_new_tokens` must be at least 1"),
        ({"min_new_tokens": -1}, "`min_new_tokens` must not be negative"),
        ({"min_new_tokens": 6}, r"`min_new_tokens` \(6\) is larger"),
    ],
    ids=str,
)
def test_requests_that_contradict_themselves(fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"request_id": "a", "prompt": (3, 4, 5), "max_new_tokens": 5}
    with pytest.raises(ValueError, match=message):
        Request(**{**good, **fields})
    assert Request(**good, min_new_tokens=5).min_new_tokens == 5


def test_requests_are_immutable() -> None:
    request = Request("a", (1,), 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.max_new_tokens = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.sampling.top_k = 2  # type: ignore[misc]
