"""`no_repeat_ngram_size` above the size that the vectorised sampler compares, with work bounded by the history.

transformers compares every window of the history with its end, token by token: the work is history length times n-gram
size. Here each window gets a *name*, and equal windows get equal names. The windows' length doubles from level to
level (prefix doubling, Karp, Miller and Rosenberg, 1972). Each level sorts the history once, and there are as many
levels as the n-gram size has binary digits.
"""

from __future__ import annotations

import torch
from transformers.generation.logits_process import LogitsProcessor


class LongNGrams(LogitsProcessor):
    """Same results as `NoRepeatNGramLogitsProcessor`.

    Args:
        ngram_size: No n-gram of this size occurs twice; at least 2.
    """

    def __init__(self, ngram_size: int) -> None:
        self.ngram_size = ngram_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocab], -inf for tokens that would complete an n-gram of `input_ids` int64 [rows, length]."""
        rows, length = input_ids.shape
        if length < self.ngram_size:
            return scores
        vocab, prefix = scores.shape[-1], self.ngram_size - 1
        equal = _equal_to_the_end(input_ids, prefix)[:, : length - prefix]
        completing = input_ids[:, prefix:].clamp(max=vocab)
        banned = scores.new_zeros((rows, vocab + 1), dtype=torch.bool)
        banned.scatter_(1, torch.where(equal, completing, vocab), torch.ones_like(equal))
        return scores.masked_fill(banned[:, :vocab], float("-inf"))


def _equal_to_the_end(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """bool [rows, length - size + 1]: whether the window of `size` tokens at each start equals the last window."""
    names, reach = tokens, 1  # names of windows of `reach` tokens
    while 2 * reach <= size:
        # Each pair of names becomes one integer. Names are below the history's length; at first they are token ids.
        pairs = names[:, :-reach] * ((2**31) if reach == 1 else names.shape[1] + reach) + names[:, reach:]
        ordered, places = pairs.sort(dim=1)
        first = torch.zeros_like(ordered)
        first[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).long()
        names = torch.empty_like(first).scatter_(1, places, first.cumsum(1))
        reach *= 2
    # Two overlapping windows make one of `size` tokens.
    count = tokens.shape[1] - size + 1
    head, tail = names[:, :count], names[:, size - reach : size - reach + count]
    return (head == head[:, -1:]) & (tail == tail[:, -1:])
