"""Stopping criteria: the engine decides some itself, the host decides some with integers, the others are called.

None of this runs in the engine's thread. Criteria see tokens after the engine has made them, in a thread of the caller
or of the manager. The engine runs ahead; its tokens beyond a stop are dropped.
"""

from __future__ import annotations

import copy
import math
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from hf_async_batching.core.field_checks import check_real
from hf_async_batching.errors import UnsupportedArgumentError
from hf_async_batching.stopping.batch_scores import BatchScores


@dataclass(frozen=True, slots=True)
class StopConditions:
    """The conditions that end the rows of a batch.

    Attributes:
        eos: Tokens that end a row; the engine checks them itself.
        max_length: Length, padded prompt included, at which a row ends; the engine knows it in advance.
        strings: Criteria that search for strings.
        times: Criteria that check the clock.
        pads: Whether a finished row continues with the pad token, and not with the model's tokens.
        custom: Whether the list holds criteria of the caller: the list is then called as a whole.
    """

    eos: tuple[int, ...]
    max_length: float
    strings: tuple[StopStringCriteria, ...]
    times: tuple[MaxTimeCriteria, ...]
    pads: bool
    custom: bool

    @property
    def by_engine(self) -> bool:
        """Whether the engine alone ends every row in time."""
        return not (self.strings or self.times or self.custom)


def read_criteria(criteria: StoppingCriteriaList) -> StopConditions:
    """Sort criteria that `generate` has prepared: decided by the engine, decided by the host, or called.

    Subclasses of transformers' classes count as the caller's own.
    """
    eos: dict[int, None] = {}
    max_length = math.inf
    strings, times, custom = [], [], False
    for criterion in criteria:
        kind = type(criterion)
        if kind is MaxLengthCriteria:
            max_length = min(max_length, criterion.max_length)
        elif kind is EosTokenCriteria:
            eos.update(dict.fromkeys(criterion.eos_token_id.flatten().tolist()))
        elif kind is StopStringCriteria:
            strings.append(criterion)
        elif kind is MaxTimeCriteria:
            check_real("max_time", criterion.max_time)
            times.append(criterion)
        else:
            custom = True
    pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    return StopConditions(tuple(eos), max_length, tuple(strings), tuple(times), pads, custom)


class StopStrings:
    """Makes the decisions of `StopStringCriteria` on the host, for one row at a time.

    Only a token that overlaps the end of a string can complete it. A table tells such tokens without a tensor, and
    only for them the criterion itself is called.

    Args:
        criterion: It is copied, because calling it moves its tables between devices; the original is not changed.
    """

    def __init__(self, criterion: StopStringCriteria) -> None:
        self._criterion: Any = copy.copy(criterion)
        self._criterion.embedding_vec = table = criterion.embedding_vec.cpu()
        self._criterion.target_lens = criterion.target_lens.cpu()
        self.window: int = criterion.maximum_token_len
        ends = table[:, criterion.max_valid_positions * criterion.num_stop_strings : -1]
        self._completes: np.ndarray[Any, Any] = (ends > 0).any(dim=1).numpy()

    def stops(self, tokens: Sequence[int]) -> bool:
        """Whether the last of `tokens` completes a string; only the last `window` of them matter."""
        # Ids beyond the tokenizer's use the last entry of the table, as in the criterion.
        if not self._completes[min(tokens[-1], len(self._completes) - 1)]:
            return False
        return bool(self._criterion(torch.tensor([tokens[-self.window :]]), None)[0])


_by_tokenizer: weakref.WeakKeyDictionary[Any, dict[Any, StopStringCriteria]] = weakref.WeakKeyDictionary()


def stop_string_criterion(strings: str | Sequence[str], tokenizer: Any) -> StopStringCriteria:
    """The criterion that `generate` makes for `stop_strings`; cached, because making it reads the whole vocabulary.

    Raises:
        TypeError: `strings` is neither a string nor a list.
        ValueError: There is no tokenizer, or `strings` holds something else than non-empty strings.
    """
    if not isinstance(strings, (str, Iterable)):
        raise TypeError(f"`stop_strings` must be a string or a list of strings, got {strings!r}")
    strings = (strings,) if isinstance(strings, str) else tuple(strings)
    if tokenizer is None:
        raise ValueError(
            "`stop_strings` needs the model's tokenizer: pass `tokenizer` too (to hf_async_batching.generate, "
            "GenerationManager.submit or .bind), since strings are found across the borders of tokens"
        )
    if not strings or not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"`stop_strings` must be a string or a list of strings, none of them empty; got {strings!r}")
    try:
        kept = _by_tokenizer.setdefault(tokenizer, {})
    except TypeError:  # a tokenizer without weak references
        return StopStringCriteria(tokenizer=tokenizer, stop_strings=list(strings))
    key = (strings, len(tokenizer))
    if key not in kept:
        if len(kept) >= 8:
            kept.clear()
        kept[key] = StopStringCriteria(tokenizer=tokenizer, stop_strings=list(strings))
    return kept[key]


class StopChecker(Protocol):
    """Reports, step by step, which rows of a batch have finished."""

    def step(self, tokens: list[int]) -> list[bool]:
        """Take the next token of every row; returns for each row whether it has finished."""
        ...


class HostStopChecker:
    """Decides transformers' own criteria with integers, with the same results as calling them.

    Args:
        prompts: The padded prompts, one list of token ids per row.
        stops: Result of `read_criteria`, without custom criteria.
    """

    def __init__(self, prompts: list[list[int]], stops: StopConditions) -> None:
        self._eos = frozenset(stops.eos)
        self._max_length = stops.max_length
        self._length = len(prompts[0])
        self._strings = [StopStrings(criterion) for criterion in stops.strings]
        self._times = stops.times
        window = max((string.window for string in self._strings), default=0)
        self._rows = [row[-window:] for row in prompts] if window else []

    def step(self, tokens: list[int]) -> list[bool]:
        """See `StopChecker`."""
        self._length += 1
        for row, token in zip(self._rows, tokens):
            row.append(token)
        if self._length >= self._max_length or any(_is_over(criterion) for criterion in self._times):
            return [True] * len(tokens)
        found = [token in self._eos for token in tokens]
        for string in self._strings:
            found = [done or string.stops(row) for done, row in zip(found, self._rows)]
        return found


class CriteriaListChecker:
    """Calls the caller's list of criteria exactly as `generate` does: once per step, with the whole batch.

    Args:
        input_ids: The padded prompts [batch, length]; criteria get int64 [batch, length + step] on their device.
        criteria: Criteria as `generate` has prepared them, including its own.
        scores: The batch's scores, which criteria see if `generate` returns them; otherwise None.
    """

    def __init__(
        self, input_ids: torch.Tensor, criteria: StoppingCriteriaList, scores: BatchScores | None = None
    ) -> None:
        self._criteria = criteria
        self._scores = scores
        self._pads = read_criteria(criteria).pads
        self._live = [True] * input_ids.shape[0]
        self._history = input_ids
        self._unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)

    def step(self, tokens: list[int]) -> list[bool]:
        """See `StopChecker`."""
        # A new tensor in each step, as in `generate`: a criterion may keep its input, or write to it.
        new = torch.tensor(tokens, device=self._history.device)[:, None]
        self._history = torch.cat([self._history, new], dim=-1)
        scores: Any = self._scores.after(self._live) if self._scores is not None else None
        self._unfinished = self._unfinished & ~self._criteria(self._history, scores)
        live = [bool(unfinished) for unfinished in self._unfinished.tolist()]
        if self._pads:  # otherwise rows continue after they have finished
            self._live = live
        return [not one for one in live]


def check_ends(stops: StopConditions, pad: torch.Tensor | None) -> None:
    """Refuse criteria that end rows if there is no token to fill the rows with.

    Raises:
        ValueError: Finished rows are padded, but there is no pad token.
    """
    if stops.pads and pad is None:
        raise ValueError(
            "`stopping_criteria` ends rows at an end-of-sequence token, and there is no token to fill them with; "
            "pass `pad_token_id`"
        )


def check_other_ends(min_new_tokens: int) -> None:
    """Refuse a minimum length if a criterion has other end-of-sequence tokens than the config, to which it applies.

    Raises:
        UnsupportedArgumentError: There is a minimum length.
    """
    if min_new_tokens:
        raise UnsupportedArgumentError(
            "`stopping_criteria`: EosTokenCriteria has other tokens than `eos_token_id`, which is not served together "
            "with `min_new_tokens` or `min_length`; pass `eos_token_id` to generate instead"
        )


def _is_over(criterion: MaxTimeCriteria) -> bool:
    return time.time() - criterion.initial_timestamp > criterion.max_time
