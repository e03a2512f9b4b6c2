"""Stopping criteria of many kinds, which write down what they are called with."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation import StoppingCriteria


class RowWise(StoppingCriteria):
    """Stops a row at a token of a set, once it has `least` new tokens, and records its calls."""

    def __init__(self, tokens: set[int], least: int = 0) -> None:
        self.tokens, self.least = tokens, least
        self.calls: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append((input_ids.tolist(), input_ids.dtype, input_ids.device, input_ids.is_contiguous(), scores))
        self.calls[-1] += (kwargs,)
        done = [row[-1] in self.tokens and len(self.calls) > self.least for row in input_ids.tolist()]
        return torch.tensor(done, device=input_ids.device)


class WholeBatch(StoppingCriteria):
    """Remembers which rows of a fixed batch are done, and says one thing for all of them, as a plain bool.

    After the criterion with which lm-evaluation-harness stops at a sequence of several tokens.
    """

    def __init__(self, tokens: set[int], prompt_length: int, batch_size: int) -> None:
        self.tokens, self.prompt_length = tokens, prompt_length
        self.done_tracker = [False] * batch_size
        self.calls: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.calls.append((input_ids.tolist(), list(self.done_tracker)))
        assert len(input_ids) == len(self.done_tracker), "the batch is not the one it was made for"
        for i, row in enumerate(input_ids[:, self.prompt_length :][:, -3:].tolist()):
            if not self.done_tracker[i]:
                self.done_tracker[i] = bool(self.tokens & set(row))
        return False not in self.done_tracker


class Raises(StoppingCriteria):
    """Fails at its `at`-th call."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.count += 1
        if self.count == self.at:
            raise ZeroDivisionError("the criterion's own mistake")
        return torch.zeros(len(input_ids), dtype=torch.bool)
