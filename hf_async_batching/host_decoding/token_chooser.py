"""Choose a batch's tokens from its logits as `generate` does: with its processors, its arg-max, and seeded draws.

The engine itself applies the processors that can be read as parameters, for all requests at once (see
`inputs.logits_processors`). Any other list of processors is called here, as a whole and in its order. It gets the same
input as in `generate`: the rows of the call as one batch, step by step, with their whole history.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers.generation.logits_process import LogitsProcessorList

from hf_async_batching.runtime.forking import ForkSafeLock
from hf_async_batching.sampling.sampler import draw, log_probabilities, seed_records


class Chosen(NamedTuple):
    """The tokens of one step.

    Attributes:
        tokens: int64 [rows].
        scores: float32 [rows, vocab], the scores after the processors.
        logits: float32 [rows, vocab], the model's own logits; None if not requested.
        logprobs: float32 [rows] under the model's own logits; None if not requested.
    """

    tokens: torch.Tensor
    scores: torch.Tensor
    logits: torch.Tensor | None
    logprobs: torch.Tensor | None


class TokenChooser:
    """Chooses the tokens of some rows, step by step.

    Args:
        processors: Processors for these rows, as `generate` has prepared them.
        prompt: int64 [rows, length], the prompts as processors see them, padding included, on the caller's device.
        do_sample: Whether to draw tokens.
        seeds: One per row.
        lengths: Length of each prompt in tokens, without padding; the draws depend on it.
        logprobs: Whether to return log-probabilities.
        logits: Whether to return the model's own logits.

    Attributes:
        prompt: The argument.
        processors: The argument.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        prompt: torch.Tensor,
        *,
        do_sample: bool,
        seeds: list[int],
        lengths: list[int],
        logprobs: bool = False,
        logits: bool = False,
    ) -> None:
        self.prompt = prompt
        self.processors = processors
        self._records = seed_records(seeds, prompt.device) if do_sample else None
        self._positions = torch.tensor(lengths, dtype=torch.int32, device=prompt.device)
        self._logprobs = logprobs
        self._logits = logits
        self._locks = {_lock_of(processor) for processor in processors}

    def __call__(self, history: torch.Tensor, logits: torch.Tensor) -> Chosen:
        """Choose one token per row.

        Args:
            history: int64 [rows, length + step], on the caller's device.
            logits: float32 [rows, vocab], on the same device; may be changed.

        Raises:
            ValueError: A processor returned scores of another shape.
            InvalidProbabilitiesError: No token can be drawn: a row's scores hold NaN or an infinity, or are all minus
                infinity.
            BaseException: Any error of a processor.
        """
        own = logits.clone() if self._logits or self._logprobs else logits
        scores: torch.Tensor = self.processors(history, logits)  # type: ignore[arg-type]
        if scores.shape != logits.shape:
            raise ValueError(
                f"a `logits_processor` returned scores of shape {tuple(scores.shape)}, expected {tuple(logits.shape)}"
            )
        if self._records is None:
            tokens = scores.argmax(-1)
        else:
            step = history.shape[1] - self.prompt.shape[1]
            tokens = draw(scores.float(), self._records, self._positions + step)
        logprobs = log_probabilities(own, tokens) if self._logprobs else None
        return Chosen(tokens, scores, own if self._logits else None, logprobs)

    @contextlib.contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Lock the processors for this thread: requests with threads of their own may share processors."""
        with contextlib.ExitStack() as held:
            # In a fixed order, so that no two threads wait for each other.
            for lock in sorted(self._locks, key=id):
                held.enter_context(lock)
            yield

    def __reduce__(self) -> Any:
        # Other ranks of a sharded model only need to know that there is a chooser; they never call it.
        return (_Elsewhere, ())


class _Elsewhere:
    """Stands for a chooser on ranks that do not run it."""


# Locks by the address of a processor. A chooser holds its processors and their locks, so an address belongs to one
# object as long as its lock is here.
_locks: weakref.WeakValueDictionary[int, threading.RLock] = weakref.WeakValueDictionary()
_locks_lock = ForkSafeLock()


def _lock_of(processor: Any) -> threading.RLock:
    with _locks_lock:
        lock = _locks.get(id(processor))
        if lock is None:
            lock = _locks[id(processor)] = threading.RLock()
        return lock
