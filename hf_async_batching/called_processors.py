"""Logits processors that are called for one request, as `generate` would call them.

A request whose processors the engine knows by their parameters is changed and filtered together with all others (see
`processor_reader`). Any other list is called as a whole, in its order, with what it gets in `generate`: the full
history and scores in float32, of the request's own row. In a `generate` call of several rows each row is a call of
its own: processors see a batch of one.
"""

from __future__ import annotations

import torch
from transformers.generation.logits_process import LogitsProcessorList


class CalledProcessors:
    """The processors of one request.

    Args:
        processors: The list, for this request's row alone.
        shown: int64 [length], the prompt as the caller passed it on, padding included; None where the history that
            the engine keeps is the same.
        prompt_length: Tokens of the prompt without its padding.
        device: Where the caller's tensors are: `generate` calls processors there.

    Attributes:
        processors: The list.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        shown: torch.Tensor | None,
        prompt_length: int,
        device: torch.device | None = None,
    ) -> None:
        self.processors = processors
        self._shown = shown
        self._prompt_length = prompt_length
        self._device = device

    def __call__(self, history: torch.Tensor, length: int, scores: torch.Tensor) -> torch.Tensor:
        """Scores after all processors.

        Args:
            history: int64 [tokens], what the engine keeps: prompt and completion.
            length: How many of its last tokens are prompt and completion.
            scores: float32 [1, vocab]; may be changed.

        Returns:
            float32 [1, vocab].

        Raises:
            BaseException: Whatever a processor raises.
        """
        if self._device is not None:
            history, scores = history.to(self._device), scores.to(self._device)
        if self._shown is not None:
            completion = history[history.shape[0] - length + self._prompt_length :]
            history = torch.cat([self._shown, completion])
        out: torch.Tensor = self.processors(history[None], scores)  # type: ignore[arg-type]
        return out
