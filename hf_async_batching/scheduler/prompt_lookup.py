"""Prompt lookup: drafts that are copied from what a request holds already, and checked by the step that computes them.

Where the last tokens of a sequence have stood before, what followed them there may follow again. A step then computes
the last token and such a draft together, and samples at every position: what it samples up to the first place at which
it differs from the draft is what steps of one token would have sampled. The idea and the size of the n-grams are those
of https://github.com/apoorvumang/prompt-lookup-decoding, which `generate` serves as `prompt_lookup_num_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_DRAFTED = 64
"""Positions of a step that drafts may add to the one that each row samples."""

_LONGEST_REST = 32

_LONGEST_NGRAM = 32  # longer ones say little more, and each length is a pass over what was found


class PromptLookup:
    """Finds drafts for one sequence.

    Wrong drafts cost time: after one of which nothing was right the next is half as long, and it rests for a token
    before that, after another one for two, and so on up to 32; until something is right again.

    Args:
        num_tokens: Tokens of a draft, at most.
        max_ngram: How many of the last tokens are looked up; fewer where these have not stood before.
        ends: Tokens that no draft contains: nothing follows them.
    """

    def __init__(self, num_tokens: int, max_ngram: int, ends: frozenset[int]) -> None:
        self._num_tokens = num_tokens
        self._max_ngram = min(max_ngram, _LONGEST_NGRAM)
        self._ends = ends
        self._history = np.empty(0, np.int64)
        self._known = 0
        self._length = num_tokens
        self._rest = 0
        self._resumes_at = 0

    def find(self, tokens: Sequence[int], limit: int) -> tuple[int, ...]:
        """A draft of at most `limit` tokens behind `tokens`; empty where there is none.

        Args:
            tokens: The sequence so far; from call to call it only grows.
            limit: Further bound on the length of the draft.
        """
        count = len(tokens)
        if count < self._resumes_at or limit < 1:
            return ()
        history = self._extended(tokens)
        # Where the last token has stood before: the index behind it.
        found = np.flatnonzero(history[:-1] == history[-1]) + 1
        for size in range(2, min(self._max_ngram, count - 1) + 1):
            longer = found[found >= size]
            longer = longer[history[longer - size] == history[count - size]]
            if not len(longer):
                break
            found = longer
        if not len(found):
            return ()
        length = min(self._length, limit)
        # The latest place that has enough behind it; the first one has the most.
        enough = found[found <= count - length]
        start = int(enough[-1]) if len(enough) else int(found[0])
        draft: list[int] = history[start : start + length].tolist()
        end = next((i for i, token in enumerate(draft) if token in self._ends), len(draft))
        return tuple(draft[:end])

    def judged(self, drafted: int, accepted: int, length: int) -> None:
        """Remember what became of a draft.

        Args:
            drafted: Its tokens; 0 where there was none after all.
            accepted: How many of them were right.
            length: Tokens of the sequence by now.
        """
        if accepted:
            self._length = self._num_tokens
        elif drafted:
            self._length = max(1, self._length // 2)
        self._rest = 0 if accepted else min(max(1, 2 * self._rest), _LONGEST_REST)
        self._resumes_at = length + self._rest

    def _extended(self, tokens: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        count = len(tokens)
        if count > len(self._history):
            larger = np.empty(max(64, 2 * count), np.int64)
            larger[: self._known] = self._history[: self._known]
            self._history = larger
        self._history[self._known : count] = tokens[self._known :]
        self._known = count
        return self._history[:count]


def num_accepted(draft: tuple[int, ...], sampled: Sequence[int]) -> int:
    """How many leading tokens of a draft were sampled, too.

    Args:
        draft: Its tokens.
        sampled: What was sampled in their places, and behind the last one.
    """
    return next((i for i, (drafted, token) in enumerate(zip(draft, sampled)) if drafted != token), len(draft))
