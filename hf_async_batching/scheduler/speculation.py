"""Decide when sequences compute drafts (see `prompt_lookup`), and check the drafts: a part of the scheduler's policy.

A draft continues tokens that the host knows. A sequence that could draft is therefore *paused*: no step is planned for
it until its tokens in flight have arrived. Then a step sends its last token and the draft to its row, as a piece of a
prompt, and samples at every position. The sequence continues from the right tokens. Other rows do not wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hf_async_batching.core.plan import NewPage
from hf_async_batching.kv_cache.kv_cache_manager import KVCacheManager
from hf_async_batching.scheduler.prompt_lookup import num_accepted
from hf_async_batching.scheduler.sequence import Sequence, State


class DraftInFlight(NamedTuple):
    """A draft that a step computes: its sequence, and its first sampled position in the step."""

    sequence: Sequence
    first: int
    tokens: tuple[int, ...]


class Drafting:
    """Decides which sequences draft, and checks drafts.

    Args:
        kv_cache: Gives the pages for drafts.
        max_rows: No sequence drafts while more sequences than this run; 0 for no drafts.

    Attributes:
        drafted: Number of tokens in all checked drafts.
        accepted: Number of these tokens that were right.
    """

    def __init__(self, kv_cache: KVCacheManager, max_rows: int) -> None:
        self.max_rows = max_rows
        self.drafted = 0
        self.accepted = 0
        self._kv_cache = kv_cache
        self._pages = kv_cache.pages
        self._were_few = False

    def choose(self, drafters: list[Sequence], *, running: int, waiting: int) -> bool:
        """Let each sequence that can draft do so, or continue as the others do.

        Args:
            drafters: Running sequences that have a `lookup`.
            running: Number of running sequences.
            waiting: Number of sequences that wait for a row.

        Returns:
            Whether a drafter stopped or resumed decoding.
        """
        few = not waiting and running <= self.max_rows
        # With many sequences none is paused and none has a draft to give up, after this was done once.
        changed = self._update(drafters, few) if few or self._were_few else False
        self._were_few = few
        return changed

    def _update(self, drafters: list[Sequence], few: bool) -> bool:
        """The same, for sequences that may start drafts (`few`), or must give them up."""
        changed = False
        for sequence in drafters:
            if sequence.state is State.DECODING:
                was_paused = sequence.paused
                sequence.paused = False
                if few and sequence.wants_more:
                    self._consider(sequence, was_paused)
                changed |= was_paused != sequence.paused or sequence.state is not State.DECODING
            elif sequence.restarts:
                sequence.draft = _find(sequence) if few else ()
        return changed

    def _consider(self, sequence: Sequence, was_paused: bool) -> None:
        """Let a decoding sequence draft, or pause it until it can."""
        if sequence.placeholders:
            sequence.paused = was_paused or bool(_find(sequence))
        elif sequence.num_computed == sequence.next_page_at or not self._has_room(sequence):
            pass  # a sequence's next token may preempt others for its page, but a draft never may
        elif draft := _find(sequence):
            sequence.draft = draft
            sequence.state = State.PREFILLING
            sequence.restarts = True
        elif was_paused:
            assert sequence.lookup is not None
            sequence.lookup.judged(0, 0, len(sequence.tokens))

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether there is a page for the last token, a drafted token, and one more."""
        room = self._pages.room_in(len(sequence.pages.ids))
        return self._pages.available >= self._pages.groups or len(sequence.tokens) + 2 <= room

    def begin(self, sequence: Sequence, limit: int) -> list[NewPage]:
        """Fix the draft of a sequence that restarts in this step; available pages limit its length.

        Args:
            sequence: It has the page of its last token.
            limit: Largest number of tokens to draft.

        Returns:
            The page-table entries that the step must set.
        """
        sequence.restarts = False
        sequence.draft = sequence.draft[:limit]
        if not sequence.draft:
            return []
        length = len(sequence.tokens)
        # Room for one more token than the draft, so that there is always a page to continue in.
        entries = self._kv_cache.extend_to(sequence.pages, length + len(sequence.draft) + 1)
        if entries is None:
            room = self._pages.room_in(len(sequence.pages.ids))
            sequence.draft = sequence.draft[: max(0, room - length - 1)]
            return []
        return entries

    def check(
        self, drafts: Iterable[DraftInFlight], sampled: list[Sequence], tokens: list[int], logprobs: list[float | None]
    ) -> tuple[list[Sequence], list[int], list[float | None]]:
        """The result of a step with drafts: the positions of each draft up to its first wrong token.

        Args:
            drafts: The drafts of the step.
            sampled: The sequence of each sampled position.
            tokens: The tokens sampled at these positions.
            logprobs: Log-probabilities of these tokens, or None.

        Returns:
            The sequences, tokens and log-probabilities of the positions that count.
        """
        dropped: set[int] = set()
        for sequence, first, draft in drafts:
            accepted = num_accepted(draft, tokens[first:])
            dropped.update(range(first + accepted + 1, first + len(draft) + 1))
            self.drafted += len(draft)
            self.accepted += accepted
            assert sequence.lookup is not None
            sequence.lookup.judged(len(draft), accepted, len(sequence.tokens) + accepted + 1)
        valid = [position for position in range(len(sampled)) if position not in dropped]
        return [sampled[i] for i in valid], [tokens[i] for i in valid], [logprobs[i] for i in valid]


def _find(sequence: Sequence) -> tuple[int, ...]:
    """A draft that leaves room for one more token."""
    assert sequence.lookup is not None
    return sequence.lookup.find(sequence.tokens, sequence.max_length - len(sequence.tokens) - 1)


def settle_drafts(drafts: Iterable[DraftInFlight]) -> None:
    """Let sequences whose drafts were checked, and that have not ended, continue from their accepted tokens."""
    for sequence, _, _ in drafts:
        if sequence.state is State.FINISHED:
            continue
        sequence.draft = ()
        sequence.num_planned = len(sequence.tokens)
        if sequence.state is State.VERIFYING:
            sequence.state = State.PREFILLING
            sequence.restarts = True
            sequence.num_computed = len(sequence.tokens) - 1
