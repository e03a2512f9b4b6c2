"""Prompt lookup: copy drafts from a request's earlier tokens; the step that computes a draft checks it.

If the last tokens of a sequence occurred before, the tokens that followed them may follow again. A step then computes
the last token and such a draft together, and samples at every position. Up to the first difference from the draft, the
samples are those that steps of one token would have made. The idea and the n-gram size come from
https://github.com/apoorvumang/prompt-lookup-decoding, which `generate` serves as `prompt_lookup_num_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_DRAFTED = 64
"""Positions that drafts may add to a step, besides the one that each row samples."""

_LONGEST_REST = 32

_LONGEST_NGRAM = 32  # longer ones hardly help, and each length is another pass over the matches


class PromptLookup:
    """Finds drafts for one sequence.

    Wrong drafts cost time. After a draft without any right token, the next draft is half as long, and the sequence
    rests for one token first; after another such draft for two, and so on up to 32. A draft with a right token ends
    this.

    Args:
        num_tokens: Longest draft, in tokens.
        max_ngram: Number of last tokens that are looked up; fewer if these have not occurred before.
        ends: Tokens that no draft contains, because nothing follows them.
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
        """Find a draft of at most `limit` tokens that may follow `tokens`; empty if there is none.

        Args:
            tokens: The sequence so far; it only grows from call to call.
            limit: Another upper bound of the draft's length.
        """
        count = len(tokens)
        if count < self._resumes_at or limit < 1:
            return ()
        history = self._extended(tokens)
        # Indices after earlier occurrences of the last token.
        found = np.flatnonzero(history[:-1] == history[-1]) + 1
        for size in range(2, min(self._max_ngram + 1, count)):
            longer = found[found >= size]
            longer = longer[history[longer - size] == history[count - size]]
            if not len(longer):
                break
            found = longer
        if not len(found):
            return ()
        length = min(self._length, limit)
        # Take the latest occurrence with enough tokens after it, else the first one, which has the most.
        enough = found[found <= count - length]
        start = int(enough[-1]) if len(enough) else int(found[0])
        draft: list[int] = history[start : start + length].tolist()
        end = next((i for i, token in enumerate(draft) if token in self._ends), len(draft))
        return tuple(draft[:end])

    def judged(self, drafted: int, accepted: int, length: int) -> None:
        """Record the result of a draft.

        Args:
            drafted: Tokens of the draft; 0 if it was dropped.
            accepted: Number of right tokens.
            length: Current length of the sequence, in tokens.
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
            larger = np.empty(2 * count, np.int64)
            larger[: self._known] = self._history[: self._known]
            self._history = larger
        self._history[self._known : count] = tokens[self._known :]
        self._known = count
        return self._history[:count]


def num_accepted(draft: tuple[int, ...], sampled: Sequence[int]) -> int:
    """Number of leading draft tokens that were sampled.

    Args:
        draft: Tokens of the draft.
        sampled: Tokens sampled at the draft's positions, and after its last one.
    """
    return next((i for i, (drafted, token) in enumerate(zip(draft, sampled)) if drafted != token), len(draft))
