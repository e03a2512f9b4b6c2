"""When sequences draft (see `prompt_lookup`), and what becomes of a draft: a part of the scheduler's policy.

A draft stands on tokens that the host knows. A sequence that could draft is therefore *held*: planned no further until
its tokens in flight have arrived. Then it is sent to its row anew, with its last token and the draft as a piece of a
prompt of which every position is sampled, and goes on from the tokens that were right. Other rows do not wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hf_async_batching.core.plan import NewPage
from hf_async_batching.kv_cache.page_allocator import PageAllocator
from hf_async_batching.scheduler.prompt_lookup import num_accepted
from hf_async_batching.scheduler.sequence import Sequence, State


class Drafted(NamedTuple):
    """A draft in flight: whose it is, and the first of its sampled positions in the step."""

    sequence: Sequence
    first: int
    tokens: tuple[int, ...]


class Drafting:
    """Decides who drafts.

    Args:
        pages: Where a draft's pages come from.
        max_rows: Nobody drafts while more sequences run.

    Attributes:
        drafted: Tokens of all drafts that were checked.
        accepted: Those that were right.
    """

    def __init__(self, pages: PageAllocator, max_rows: int) -> None:
        self.max_rows = max_rows
        self.drafted = 0
        self.accepted = 0
        self._pages = pages

    def choose(self, sequences: list[Sequence], few: bool) -> bool:
        """Hold, let go, or draft for each of `sequences`, which have a `lookup`.

        Args:
            sequences: Some of those that run.
            few: Whether drafts may begin.

        Returns:
            Whether any of them decodes no longer, or does so again.
        """
        changed = False
        for sequence in sequences:
            if sequence.state is State.DECODING:
                was_held = sequence.held
                sequence.held = False
                if few and sequence.wants_more:
                    self._consider(sequence, was_held)
                changed |= was_held != sequence.held or sequence.state is not State.DECODING
            elif sequence.restarts:
                sequence.draft = _find(sequence) if few else ()
        return changed

    def _consider(self, sequence: Sequence, was_held: bool) -> None:
        """Let a sequence that decodes draft, or hold it until it can."""
        if sequence.placeholders:
            sequence.held = was_held or bool(_find(sequence))
        elif sequence.computed == sequence.decide_at or not self._has_place(sequence):
            pass  # for the page of its next token others may have to make room; for a draft nobody does
        elif draft := _find(sequence):
            sequence.draft = draft
            sequence.state = State.PREFILLING
            sequence.restarts = True
        elif was_held:
            assert sequence.lookup is not None
            sequence.lookup.judged(0, 0, len(sequence.tokens))

    def _has_place(self, sequence: Sequence) -> bool:
        """Whether there is a page for the last token, one that is drafted, and one behind it."""
        pages = self._pages
        return pages.available >= pages.groups or len(sequence.tokens) + 2 <= pages.room_in(len(sequence.pages))

    def begin(self, sequence: Sequence, limit: int, new_pages: list[NewPage]) -> None:
        """Settle the draft of a sequence that restarts in this step: what it has pages for, or gets now.

        Args:
            sequence: It has the page of its last token.
            limit: Tokens that it can draft.
            new_pages: Gets the pages that it gets.
        """
        sequence.restarts = False
        length = len(sequence.tokens)
        sequence.draft = sequence.draft[:limit]
        # One more token than is drafted, so that there is always a page to go on in.
        missing = self._pages.pages_for(length + len(sequence.draft) + 1) - len(sequence.pages)
        if not sequence.draft or missing <= 0:
            return
        taken = self._pages.take(missing)
        if taken is None:
            sequence.draft = sequence.draft[: max(0, self._pages.room_in(len(sequence.pages)) - length - 1)]
            return
        for page in taken:
            new_pages.append(NewPage(sequence.row, len(sequence.pages), page))
            sequence.pages.append(page)

    def check(
        self, drafts: list[Drafted], sampled: list[Sequence], tokens: list[int], logprobs: list[float | None]
    ) -> tuple[list[Sequence], list[int], list[float | None]]:
        """What a step with drafts yields: of each draft's positions, those up to the first wrong token.

        Args:
            drafts: The step's.
            sampled: Whose each sampled position is.
            tokens: What was sampled there.
            logprobs: Their log-probabilities.
        """
        dropped: set[int] = set()
        for sequence, first, draft in drafts:
            accepted = num_accepted(draft, tokens[first:])
            dropped.update(range(first + accepted + 1, first + len(draft) + 1))
            self.drafted += len(draft)
            self.accepted += accepted
            assert sequence.lookup is not None
            sequence.lookup.judged(len(draft), accepted, len(sequence.tokens) + accepted + 1)
        kept = [position for position in range(len(sampled)) if position not in dropped]
        return [sampled[i] for i in kept], [tokens[i] for i in kept], [logprobs[i] for i in kept]


def _find(sequence: Sequence) -> tuple[int, ...]:
    """A draft behind which one more token fits."""
    assert sequence.lookup is not None
    return sequence.lookup.find(sequence.tokens, sequence.max_length - len(sequence.tokens) - 1)


def settle_drafts(sequences: Iterable[Sequence]) -> None:
    """Let sequences whose drafts were checked, and which have not ended with them, go on from what they hold."""
    for sequence in sequences:
        if sequence.state is State.FINISHED:
            continue
        sequence.draft = ()
        sequence.planned = len(sequence.tokens)
        if sequence.state is State.VERIFYING:
            sequence.state = State.PREFILLING
            sequence.restarts = True
            sequence.computed = len(sequence.tokens) - 1
