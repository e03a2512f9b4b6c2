"""Settle the tokens of a step: outputs for the callers, and which sequences have ended. No torch, no threads."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from itertools import repeat
from typing import NamedTuple

from hf_async_batching.scheduler.sequence import Sequence, State


class TokenOutput(NamedTuple):
    """Output for one caller: a token (None if the request ends without one) and, if the request ended, the reason."""

    request_id: str
    token: int | None
    logprob: float | None = None
    finish_reason: str | None = None


# Called once per row and step; the named tuple's own constructor takes three times as long.
_token_output = partial(tuple.__new__, TokenOutput)


class Settled(NamedTuple):
    """The outcome of a step.

    Attributes:
        outputs: Output for the callers, in the order of the sampled positions.
        ended: Sequences that ended with the step; their state is FINISHED.
        offered: Requests whose logits the step offers to their choosers.
    """

    outputs: list[TokenOutput]
    ended: Collection[Sequence]
    offered: Collection[str]


_settled = partial(tuple.__new__, Settled)


class Settler:
    """Appends sampled tokens to their sequences.

    Most steps have the same sequences as the previous step, and none of them ends. If the settler gets the same
    sequences a second time, it prepares a fast path, and takes it as long as no sequence can end.
    """

    def __init__(self) -> None:
        self._last: list[Sequence] = []
        self._steady: _Steady | None = None

    def settle(self, sampled: list[Sequence], tokens: list[int], logprobs: list[float | None]) -> Settled:
        """Append the tokens of a step. Tokens of sequences that have ended before are dropped.

        Args:
            sampled: The sequence of each sampled position. The same list object as in an earlier call means the same
                sequences.
            tokens: The token of each position. A sequence with a chooser gets no token: it waits for its chooser's
                token.
            logprobs: Log-probabilities of the tokens, or None.
        """
        steady = self._steady
        if steady is not None and steady.sequences is sampled:
            outputs = steady.settle(tokens, logprobs)
            if outputs is not None:
                return _settled((outputs, (), ()))
        outputs = list[TokenOutput]()
        ended: list[Sequence] = []
        offered: list[str] = []
        finished = State.FINISHED
        for sequence, token, logprob in zip(sampled, tokens, logprobs, strict=True):
            if sequence.state is finished:
                continue  # a surplus token: the request ended while this step was in flight
            if sequence.has_chooser:
                sequence.awaits_choice = True
                offered.append(sequence.request_id)
                continue
            known = sequence.tokens
            known.append(token)
            if token not in sequence.eos and len(known) < sequence.max_length:
                outputs.append(_token_output((sequence.request_id, token, logprob, None)))
                continue
            sequence.state = finished
            ended.append(sequence)
            reason = "eos" if token in sequence.eos else "length"
            outputs.append(TokenOutput(sequence.request_id, token, logprob, reason))
        again = sampled and sampled is self._last and all([s.state is not finished for s in sampled])
        self._steady = _Steady(sampled) if again else None
        self._last = sampled
        return Settled(outputs, ended, offered)

    def ended_otherwise(self) -> None:
        """Note that a sequence has ended outside `settle`."""
        self._steady = None

    def let_go(self) -> None:
        """Drop references to sequences of earlier steps."""
        self._last, self._steady = [], None


class _Steady:
    """Sequences that decode together step after step, and values for settling their tokens if no sequence ends."""

    __slots__ = ("_appends", "_eos", "_ids", "_left", "sequences")

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self._ids = [sequence.request_id for sequence in sequences]
        self._appends = [sequence.tokens.append for sequence in sequences]
        self._eos = frozenset().union(*[sequence.eos for sequence in sequences])
        self._left = min([sequence.max_length - len(sequence.tokens) for sequence in sequences])

    def settle(self, tokens: list[int], logprobs: list[float | None]) -> list[TokenOutput] | None:
        """Append a token to each sequence; None, without any change, if a sequence may end with its token."""
        if self._left == 1 or not self._eos.isdisjoint(tokens):
            return None
        self._left -= 1
        for append, token in zip(self._appends, tokens):
            append(token)
        return list(map(_token_output, zip(self._ids, tokens, logprobs, repeat(None))))
