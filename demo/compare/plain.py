"""Questions answered by the model's own `generate`, one by one or as one padded batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..serving.models import ChatModel
from ..serving.settings import ends_of


class PlainGenerate:
    """One run of `model.generate` over some questions. `run` blocks; the other methods may be called from any thread.

    Args:
        chat_model: The model.
        prompts: The questions as token ids.
        limits: The largest number of new tokens, by question.

    Attributes:
        token_ids: New tokens of the answered questions, in order; an answer's last token is the one that ends it.
        seconds: Time of the run; 0 before its end.
    """

    def __init__(self, chat_model: ChatModel, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
        self._chat_model = chat_model
        self._prompts = prompts
        self._limits = limits
        self._ends = ends_of(chat_model)
        self._stopped = threading.Event()
        self._made = 0
        self.token_ids: list[list[int]] = []
        self.seconds = 0.0

    @property
    def tokens(self) -> int:
        """New tokens so far; an estimate while a batch runs, because answers may end early."""
        return sum(map(len, self.token_ids)) + self._made

    def stop(self) -> None:
        """End the run with its next token."""
        self._stopped.set()

    def run(self, batch: int) -> None:
        """Answer the questions, `batch` at a time."""
        # The first call of a process also loads code, so it is not timed.
        self._generate(self._prompts[:1], [1])
        began = time.perf_counter()
        for first in range(0, len(self._prompts), batch):
            if self._stopped.is_set():
                break
            part = slice(first, first + batch)
            answers = self._generate(self._prompts[part], self._limits[part])
            self._made = 0
            self.token_ids += answers
        self.seconds = time.perf_counter() - began

    def _generate(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
        model: Any = self._chat_model.model
        longest = max(map(len, prompts))
        pad = self._ends[0] if self._ends else 0
        ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

        def count(made: int) -> None:
            self._made = sum(min(made, limit) for limit in limits)

        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(limits),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=list(self._ends) or None,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([_Limits(longest, limits, self._stopped, count)]),
        )
        rows = output[:, longest:].tolist()
        return [self._answer(row[:limit]) for row, limit in zip(rows, limits, strict=True)]

    def _answer(self, tokens: list[int]) -> list[int]:
        """Cut the padding after the end of an answer."""
        end = next((index for index, token in enumerate(tokens) if token in self._ends), len(tokens))
        return tokens[: end + 1]


class _Limits(StoppingCriteria):
    """Ends each row at its own limit, and all rows once the run is stopped."""

    def __init__(self, prompt: int, limits: Sequence[int], stopped: threading.Event, count: Any) -> None:
        self._prompt = prompt
        self._limits = torch.tensor(limits)
        self._stopped = stopped
        self._count = count

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        made = input_ids.shape[1] - self._prompt
        self._count(made)
        done = self._limits <= made if not self._stopped.is_set() else torch.ones_like(self._limits, dtype=torch.bool)
        return done.to(input_ids.device)
