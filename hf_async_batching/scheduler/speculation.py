"""When sequences compute drafts (see `prompt_lookup`), and what becomes of a draft: a part of the scheduler's policy.

A draft stands on tokens that the host knows. A sequence that could draft is therefore *paused*: no step is planned for
it until its tokens in flight have arrived. Then the step sends its last token and the draft
to its row anew, as a piece of a prompt, and samples every position. The sequence goes on from the tokens that were
right. Other rows do not wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hf_async_batching.core.plan import NewPage
from hf_async_batching.kv_cache.kv_cache_manager import KVCacheManager
from hf_async_batching.scheduler.prompt_lookup import num_accepted
from hf_async_batching.scheduler.sequence import Sequence, State


class DraftInFlight(NamedTuple):
    """A draft that a step computes: its sequence, and the first of its sampled positions in the step."""

    sequence: Sequence
    first: int
    tokens: tuple[int, ...]


class Drafting:
    """Decides which sequences draft, and checks drafts.

    Args:
        kv_cache: Gives the pages for drafts.
        max_rows: No sequence drafts while more than this run; 0 is never.

    Attributes:
        drafted: Tokens of all drafts that were checked.
        accepted: Those that were right.
    """

    def __init__(self, kv_cache: KVCacheManager, max_rows: int) -> None:
        self.max_rows = max_rows
        self.drafted = 0
        self.accepted = 0
        self._kv_cache = kv_cache
        self._pages = kv_cache.pages
        self._were_few = False

    def choose(self, drafters: list[Sequence], *, running: int, waiting: int) -> bool:
        """Let each sequence that can draft do so, or go on as the others do.

        Args:
            drafters: Running sequences that have a `lookup`.
            running: How many sequences run.
            waiting: How many wait for a row.

        Returns:
            Whether one of the drafters decodes no longer, or does so again.
        """
        few = not waiting and running <= self.max_rows
        # Among many, no sequence is paused or has a draft to give up, once that has been done.
        changed = self._update(drafters, few) if few or self._were_few else False
        self._were_few = few
        return changed

    def _update(self, drafters: list[Sequence], few: bool) -> bool:
        """The same, where drafts may begin (`few`) or must be given up."""
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
        """Let a sequence that decodes draft, or pause it until it can."""
        if sequence.placeholders:
            sequence.paused = was_paused or bool(_find(sequence))
        elif sequence.num_computed == sequence.next_page_at or not self._has_room(sequence):
            pass  # other sequences may have to make room for the page of its next token, and never for a draft
        elif draft := _find(sequence):
            sequence.draft = draft
            sequence.state = State.PREFILLING
            sequence.restarts = True
        elif was_paused:
            assert sequence.lookup is not None
            sequence.lookup.judged(0, 0, len(sequence.tokens))

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether there is a page for the last token, a drafted one, and one behind it."""
        room = self._pages.room_in(len(sequence.pages.ids))
        return self._pages.available >= self._pages.groups or len(sequence.tokens) + 2 <= room

    def begin(self, sequence: Sequence, limit: int) -> list[NewPage]:
        """Fix the draft of a sequence that restarts in this step: as long as there are pages for it.

        Args:
            sequence: It has the page of its last token.
            limit: Tokens that it can draft.

        Returns:
            The page-table entries that the step must set.
        """
        sequence.restarts = False
        sequence.draft = sequence.draft[:limit]
        if not sequence.draft:
            return []
        length = len(sequence.tokens)
        # One more token than is drafted, so that there is always a page to go on in.
        entries = self._kv_cache.extend_to(sequence.pages, length + len(sequence.draft) + 1)
        if entries is None:
            room = self._pages.room_in(len(sequence.pages.ids))
            sequence.draft = sequence.draft[: max(0, room - length - 1)]
            return []
        return entries

    def check(
        self, drafts: Iterable[DraftInFlight], sampled: list[Sequence], tokens: list[int], logprobs: list[float | None]
    ) -> tuple[list[Sequence], list[int], list[float | None]]:
        """What a step with drafts yields: the positions of each draft up to its first wrong token.

        Args:
            drafts: The drafts of the step.
            sampled: The sequence of each sampled position.
            tokens: The tokens sampled there.
            logprobs: Their log-probabilities, or None.

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
    """A draft behind which one more token fits."""
    assert sequence.lookup is not None
    return sequence.lookup.find(sequence.tokens, sequence.max_length - len(sequence.tokens) - 1)


def settle_drafts(drafts: Iterable[DraftInFlight]) -> None:
    """Let sequences whose drafts were checked, and which have not ended with them, go on from what they hold."""
    for sequence, _, _ in drafts:
        if sequence.state is State.FINISHED:
            continue
        sequence.draft = ()
        sequence.num_planned = len(sequence.tokens)
        if sequence.state is State.VERIFYING:
            sequence.state = State.PREFILLING
            sequence.restarts = True
            sequence.num_computed = len(sequence.tokens) - 1
