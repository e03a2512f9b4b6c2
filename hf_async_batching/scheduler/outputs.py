"""News for callers, and the short way to it while nobody ends."""

from __future__ import annotations

from functools import partial
from itertools import repeat
from typing import NamedTuple

from hf_async_batching.scheduler.sequence import Sequence


class Emission(NamedTuple):
    """News for one caller: a token (None for a bare ending) and, if the request ended with it, why."""

    request_id: str
    token: int | None
    logprob: float | None = None
    finish_reason: str | None = None


# One per row and step: the named tuple's own constructor takes three times as long.
emission = partial(tuple.__new__, Emission)


class Steady:
    """Sequences that decode together step after step, and what settling their tokens takes where none of them ends."""

    __slots__ = ("_appends", "_eos", "_ids", "_left", "sequences")

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self._ids = [sequence.request_id for sequence in sequences]
        self._appends = [sequence.tokens.append for sequence in sequences]
        self._eos = frozenset().union(*[sequence.eos for sequence in sequences])
        self._left = min([sequence.max_length - len(sequence.tokens) for sequence in sequences])

    def settle(self, tokens: list[int], logprobs: list[float | None]) -> list[Emission] | None:
        """Append a token to each; None, with nothing done, where one of them may end with it."""
        if self._left == 1 or not self._eos.isdisjoint(tokens):
            return None
        self._left -= 1
        for append, token in zip(self._appends, tokens):
            append(token)
        return list(map(emission, zip(self._ids, tokens, logprobs, repeat(None))))
