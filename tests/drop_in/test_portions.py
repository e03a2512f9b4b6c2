"""A call with more rows than may wait is served; others keep their bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model

import hf_async_batching
from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.drop_in.portions import submit_in_portions
from hf_async_batching.errors import QueueFullError

IDS = torch.arange(3, 63).reshape(20, 3)
ARGUMENTS: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize(
    "more", [{}, {"num_return_sequences": 7, "do_sample": True, "top_k": 1}], ids=["rows", "each"]
)
@pytest.mark.parametrize("max_waiting", [1, 5])
def test_more_rows_than_may_wait_are_served(more: dict[str, Any], max_waiting: int) -> None:
    model: Any = tiny_model("Llama")
    arguments = {**ARGUMENTS, **more}
    expected = model.generate(IDS, **arguments)
    with GenerationManager(model, BatchingConfig(page_size=16, max_rows=2, max_waiting=max_waiting)) as manager:
        out: Any = hf_async_batching.generate(model, IDS, manager=manager, **arguments)
        assert torch.equal(out, expected)


class Full:
    """Takes so many portions, and then has no room or fails."""

    def __init__(self, portions: int, error: Exception) -> None:
        self.portions, self.error, self.cancelled = portions, error, 0

    def submit_requests(self, requests: list[Any]) -> list[Any]:
        if not self.portions:
            raise self.error
        self.portions -= 1
        return [self for _ in requests]

    def cancel(self) -> None:
        self.cancelled += 1


def test_the_first_portion_needs_room_and_a_failure_leaves_nothing_behind() -> None:
    requests: list[Any] = [object()] * 10
    with pytest.raises(QueueFullError):
        submit_in_portions(Full(0, QueueFullError()), requests, 4)
    fails = Full(3, ValueError("not this one"))
    with pytest.raises(ValueError, match="not this one"):
        submit_in_portions(fails, requests, 4)
    assert fails.cancelled == 6
