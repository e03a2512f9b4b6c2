"""Plan a step's prompt pieces: of prompts under way, of drafts, and of new sequences. No torch, no threads."""

from __future__ import annotations

from itertools import islice

from hf_async_batching.core.graph_buckets import padded_decodes, spread_room
from hf_async_batching.core.plan import Chunk, NewRow
from hf_async_batching.kv_cache.kv_cache_manager import KVCacheManager
from hf_async_batching.scheduler.plan_builder import PlanBuilder
from hf_async_batching.scheduler.prompt_lookup import MAX_DRAFTED
from hf_async_batching.scheduler.running import RunningSequences
from hf_async_batching.scheduler.sequence import Sequence, State
from hf_async_batching.scheduler.speculation import Drafting
from hf_async_batching.scheduler.waiting_queue import MOST_PASSED, WaitingQueue, found_a_step_later, spread_budget


class PrefillPlanner:
    """Divides the token budget that decoding leaves among prompts.

    Args:
        kv_cache: Gives rows and pages.
        waiting: Sequences that wait for a row.
        running: Sequences that have a row.
        drafting: Decides the length of a draft.
        builder: Gets the step's prompt pieces, rows and pages.
        max_rows: Total number of rows.
        max_writes: Words that a step can send to the memories of new rows; None for no limit.
        spread: Whether prompts are spread over steps if there is a free row for every waiting sequence.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        waiting: WaitingQueue,
        running: RunningSequences,
        drafting: Drafting,
        builder: PlanBuilder,
        *,
        max_rows: int,
        max_writes: int | None,
        spread: bool,
    ) -> None:
        self._kv_cache = kv_cache
        self._pages = kv_cache.pages
        self._rows = kv_cache.rows
        self._waiting = waiting
        self._running = running
        self._drafting = drafting
        self._builder = builder
        self._max_writes = max_writes
        self._spread = spread
        self._padded_decodes = padded_decodes(max_rows)

    def plan(self, budget: int, num_decoding: int, *, admit: bool) -> None:
        """Add prompt pieces to the step.

        Args:
            budget: Tokens that the step has left.
            num_decoding: Number of the step's decoding rows.
            admit: Whether sequences may start.
        """
        if self._spread and len(self._waiting) <= self._rows.available and not self._has_drafts():
            room = spread_room(self._padded_decodes, num_decoding)
            budget = spread_budget(budget, self._running, self._waiting, room=room)
        budget = self._go_on(budget)
        if admit:
            self._admit(budget)

    def _has_drafts(self) -> bool:
        """Whether drafts are about to be computed. Drafts are not spread, because their rows would wait."""
        return bool(self._running.drafters) and any(sequence.restarts for sequence in self._running.prefilling)

    def _go_on(self, budget: int) -> int:
        """Add pieces of prompts under way, and drafts; returns the remaining budget."""
        can_draft = MAX_DRAFTED
        for sequence in self._running.prefilling:
            if budget == 0:
                break
            self._kv_cache.release_before_window(sequence.pages, sequence.num_computed, sequence.last_step)
            if sequence.restarts:
                self._builder.new_pages += self._drafting.begin(sequence, min(can_draft, budget - 1))
                can_draft -= len(sequence.draft)
                again = NewRow(sequence.row, sequence.request, sequence.num_computed, again=True)
                self._builder.new_rows.append(again)
            if sequence.pages.borders:
                self._take_snapshot(sequence)
            budget -= self._add_chunk(sequence, budget)
        return budget

    def _take_snapshot(self, sequence: Sequence) -> None:
        """Keep the states after the last piece of a sequence's prompt, if the piece has ended at a border."""
        copy = self._kv_cache.take_snapshot(sequence.pages, sequence.num_computed)
        if copy is not None:
            self._builder.state_copies.append(copy)
            # Sequences that start in this step find the snapshot: their copies come after this one.
            self._kv_cache.cache_full_pages(sequence.pages, sequence.prefix_tokens, sequence.num_cacheable)

    def _admit(self, budget: int) -> None:
        """Start sequences in the order of the queue, and add first pieces of their prompts."""
        writes = passed = 0
        # Each one takes a row, or is passed, or is the last.
        for sequence in tuple(islice(self._waiting, self._rows.available + MOST_PASSED)):
            if budget <= 0 or not self._rows.available or passed == MOST_PASSED:
                break
            if sequence.has_chooser and sequence.placeholders:
                passed += 1
                continue  # preempted while its chooser chooses; others need not wait for the chooser
            if sequence.placeholders:
                break  # preempted with tokens in flight: it can be computed again only when these tokens are known
            self._kv_cache.match_prefix(sequence.pages, sequence.prefix_tokens)
            if self._pages.prefixes.enabled and found_a_step_later(
                sequence, self._builder.prefilled, self._pages.page_size, states=self._kv_cache.snapshots is not None
            ):
                passed += 1
                continue
            num_tokens = len(sequence.tokens)
            shared = self._kv_cache.shared_pages(sequence.pages)
            if not self._kv_cache.can_allocate(num_tokens, shared):
                break
            # Rows that share pages can have more entries in a step than there are pages; a step's buffers hold one per
            # page.
            if len(self._builder.new_pages) + self._pages.pages_for(num_tokens) > self._pages.size:
                break
            words = sequence.writes(self._pages.room_in(len(shared)))
            if words and self._max_writes is not None and writes + words > self._max_writes:
                break
            writes += words
            self._waiting.remove(sequence)
            self._start(sequence, shared)
            known = tuple(sequence.tokens[: sequence.num_computed]) if words else ()
            self._builder.new_rows.append(NewRow(sequence.row, sequence.request, sequence.num_computed, known))
            budget -= self._add_chunk(sequence, budget)

    def _start(self, sequence: Sequence, shared: list[int]) -> None:
        """Give a sequence its row and pages, including shared pages."""
        num_tokens = len(sequence.tokens)
        self._builder.new_pages += self._kv_cache.allocate(sequence.pages, num_tokens, shared)
        sequence.num_computed = self._pages.room_in(len(shared))
        copy = self._kv_cache.begin_states(sequence.pages, num_tokens)
        if copy is not None:
            self._builder.state_copies.append(copy)
        sequence.state = State.PREFILLING
        self._running.add(sequence)
        if sequence.last_step < 0:  # a preempted sequence is already counted
            self._pages.prefixes.count(num_tokens, sequence.num_computed)

    def _add_chunk(self, sequence: Sequence, budget: int) -> int:
        """Add the next piece of a sequence's prompt, or its draft; returns the number of its tokens."""
        chunk = self._next_chunk(sequence, budget)
        self._builder.add_chunk(sequence, chunk)
        return len(chunk.tokens)

    def _next_chunk(self, sequence: Sequence, budget: int) -> Chunk:
        """The next piece of a sequence's prompt, which counts as computed from now on."""
        self._running.changed()
        start = sequence.num_computed
        if sequence.draft:
            piece = (*sequence.tokens[start:], *sequence.draft)
            sequence.num_computed += len(piece)
            sequence.state = State.VERIFYING
            return Chunk(sequence.row, piece, len(piece))
        end = min(start + budget, len(sequence.tokens))
        if sequence.pages.borders:
            end = min(end, sequence.pages.borders[0])
        sequence.num_computed = end
        samples = end == len(sequence.tokens)
        if samples:
            sequence.state = State.DECODING
            sequence.set_next_page(self._pages.room_in(len(sequence.pages.ids)))
        return Chunk(sequence.row, tuple(sequence.tokens[start:end]), int(samples))
