"""Scores and logits of a batch, step by step, from the handles of its rows."""

from __future__ import annotations

from typing import Literal

import torch

from hf_async_batching.handle import GenerationHandle

Kind = Literal["scores", "logits"]


def stack_steps(
    handles: list[GenerationHandle], kind: Kind, lengths: list[int], device: torch.device
) -> tuple[torch.Tensor, ...] | None:
    """What `generate` returns: float32 [batch, vocab] per step, 0 for rows that had ended; None if not requested.

    Args:
        handles: One per row, each with at least its entry of `lengths` tokens.
        kind: Scores or logits.
        lengths: Number of tokens of each row up to its end, without padding.
        device: Device of the result.
    """
    rows = [handle.made(kind) for handle in handles]
    if rows[0] is None:
        return None
    steps = range(max(lengths))
    return tuple(_stack(rows, [step < length for length in lengths], step, device) for step in steps)


class BatchScores:
    """The scores of all steps so far, which `generate` shows its criteria.

    Args:
        handles: One per row.
        device: Device of the scores.
    """

    def __init__(self, handles: list[GenerationHandle], device: torch.device) -> None:
        self._handles = handles
        self._device = device
        self._steps: tuple[torch.Tensor, ...] = ()

    def after(self, live: list[bool]) -> tuple[torch.Tensor, ...]:
        """The scores of all steps, after one more step.

        Args:
            live: Rows that had not ended before this step; their tokens have arrived.
        """
        step = len(self._steps)
        rows = [handle.made("scores") for handle in self._handles]
        self._steps += (_stack(rows, live, step, self._device),)
        return self._steps


def _stack(rows: list[list[torch.Tensor] | None], live: list[bool], step: int, device: torch.device) -> torch.Tensor:
    brought = [row[step] if row is not None and alive else None for row, alive in zip(rows, live)]
    nothing = torch.zeros_like(next(one for one in brought if one is not None))
    return torch.stack([nothing if one is None else one for one in brought]).to(device)
