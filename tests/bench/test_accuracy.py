"""The accuracy gate sees a wrong token."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import greedy_alone
from transformers import PreTrainedModel

from hf_async_batching.bench.accuracy import equal_fraction, equal_to_generate, sample, teacher_forced
from hf_async_batching.bench.shapes import random_model
from hf_async_batching.bench.workloads import Workload, make_workload

Tokens = dict[str, list[int]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model("tiny", torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def workload() -> Workload:
    return make_workload("mix", 211, rows=4, prompt=20, new=12)


@pytest.fixture(scope="module")
def right(model: PreTrainedModel, workload: Workload) -> Tokens:
    return {r.request_id: greedy_alone(model, list(r.prompt), r.max_new_tokens) for r in workload.first}


def flipped(tokens: Tokens, name: str, position: int) -> Tokens:
    wrong = {key: list(value) for key, value in tokens.items()}
    wrong[name][position] = (wrong[name][position] + 1) % 211
    return wrong


@pytest.mark.parametrize("slice_size", [1, 3, 16, 512])
def test_right_tokens(model: PreTrainedModel, workload: Workload, right: Tokens, slice_size: int) -> None:
    accuracy = teacher_forced(model, workload.first, right, slice_size=slice_size)
    assert accuracy.tokens == workload.new_tokens
    assert accuracy.requests == 4
    assert accuracy.argmax_percent == 100
    assert accuracy.largest_gap == 0
    assert accuracy.distinct > 10
    assert accuracy.holds
    assert "100.00 %" in str(accuracy)


@pytest.mark.parametrize("slice_size", [1, 3, 16, 512])
@pytest.mark.parametrize("position", [0, 1, -1])
def test_one_wrong_token(
    model: PreTrainedModel, workload: Workload, right: Tokens, slice_size: int, position: int
) -> None:
    name = workload.first[1].request_id
    wrong = flipped(right, name, position)
    accuracy = teacher_forced(model, workload.first, wrong, slice_size=slice_size)
    assert accuracy.argmax_percent < 100
    assert not accuracy.holds
    assert "WRONG" in str(accuracy)
    # The gap is the logit's distance from the best one, by a forward over everything at once.
    request = workload.first[1]
    ids = torch.tensor([[*request.prompt, *wrong[name]]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(request.prompt) - 1 : -1]
    gap = logits.max(-1).values - logits.gather(1, torch.tensor(wrong[name])[:, None])[:, 0]
    assert accuracy.largest_gap == pytest.approx(float(gap.max()), abs=1e-4)


def test_the_comparison_with_generate(model: PreTrainedModel, workload: Workload, right: Tokens) -> None:
    assert equal_to_generate(model, workload.first, right) == (4, 4)
    assert equal_to_generate(model, workload.first, flipped(right, "2", -1)) == (3, 4)


def test_the_equal_fraction(right: Tokens) -> None:
    assert equal_fraction([right, right], [right, right]) == 1
    assert equal_fraction([right, right], [right, flipped(right, "0", 0)]) == 7 / 8


def test_the_sample_is_spread_and_ends_conversations() -> None:
    chat = make_workload("chat", 211, rows=4, prompt=5, new=3, turns=3)
    tokens = {f"{user}{turn}": [user] * 3 for user in range(4) for turn in ("", ".1", ".2")}
    chosen = sample(chat, tokens, 2)
    assert [request.request_id for request in chosen] == ["0.2", "2.2"]
    assert len(chosen[0].prompt) > len(chat.first[0].prompt) + 2 * 20
    assert len(sample(chat, tokens, 9)) == 4
