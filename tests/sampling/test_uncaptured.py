"""Outputs beyond tokens: scores, logits, and logits that are copied for choosers outside of the engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.plan import Features, NewRow, Offer, Plan
from hf_async_batching.core.request import Request
from hf_async_batching.core.row_layout import NEW_ROW, PARAMS
from hf_async_batching.core.row_record import record_of
from hf_async_batching.sampling.metadata import SamplingMetadata
from hf_async_batching.sampling.sampler import Sampler
from hf_async_batching.sampling.uncaptured import sample_uncaptured

LOGITS = torch.tensor([[0.0, 1.0, 3.0], [5.0, 2.0, 1.0], [1.0, 4.0, 2.0], [0.0, 0.0, 9.0]], dtype=torch.bfloat16)


class Copies(TorchDispatchMode):
    """Counts copies into existing memory."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def sampled(features: Features, offers: tuple[int, ...] = ()) -> tuple[list[int], torch.Tensor | None, Any]:
    records = np.array([record_of(NewRow(1 + i, Request(str(i), (5, 6), 9))) for i in range(len(LOGITS))], NEW_ROW)
    params = torch.from_numpy(records.view(np.int32).reshape(-1, 1 + PARAMS)[:, 1:].copy())
    metadata = SamplingMetadata(params, torch.full((len(LOGITS),), 2))
    plan = Plan(0, (1, 2, 3, 4), features=features, offers=tuple(Offer(i, str(i)) for i in offers))
    with torch.inference_mode():
        tokens, logprobs, outputs = sample_uncaptured(Sampler(False), LOGITS, metadata, plan)
    return tokens.tolist(), logprobs, outputs


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("logprobs", [False, True])
def test_what_is_asked_for_is_returned(scores: bool, logits: bool, logprobs: bool) -> None:
    tokens, found, outputs = sampled(Features(scores=scores, logits=logits, logprobs=logprobs))
    assert tokens == [2, 0, 1, 2]
    assert (outputs.scores is not None, outputs.logits is not None) == (scores, logits)
    if scores:
        assert torch.equal(outputs.scores, LOGITS.float())
    if logits:
        assert torch.equal(outputs.logits, LOGITS)
    assert (found is not None) == logprobs
    if found is not None:
        torch.testing.assert_close(found, LOGITS.float().log_softmax(-1).amax(-1))
    assert outputs.offered is None


@pytest.mark.parametrize(
    ("positions", "copies"), [((0,), 1), ((3,), 1), ((0, 1, 2, 3), 1), ((0, 2, 3), 2), ((1, 3), 2), ((0, 1, 3), 2)]
)
def test_offered_logits_are_copied_neighbours_at_once(positions: tuple[int, ...], copies: int) -> None:
    counted = Copies()
    with counted:
        _, _, outputs = sampled(Features(offers=True), positions)
    assert torch.equal(outputs.offered, LOGITS[list(positions)].float())
    assert not outputs.offered.is_inference(), "a caller's code may write to them"
    with Copies() as nothing:
        sampled(Features())
    assert counted.count - nothing.count == copies


def test_changes_of_the_logits_are_in_the_scores() -> None:
    logits = LogitsParams(remove_invalid=True)
    records = np.array([record_of(NewRow(1, Request("a", (5, 6), 9, logits=logits)))], NEW_ROW)
    params = torch.from_numpy(records.view(np.int32).reshape(1, -1)[:, 1:].copy())
    given = torch.tensor([[float("nan"), 1.0, 2.0]])
    features = Features(scores=True, logits=True, stages=logits.stages)
    _, _, outputs = sample_uncaptured(
        Sampler(False), given, SamplingMetadata(params, torch.tensor([2])), Plan(0, (1,), features=features)
    )
    assert outputs.scores is not None and outputs.logits is not None
    assert outputs.scores.tolist() == [[0.0, 1.0, 2.0]]
    assert outputs.logits is given
