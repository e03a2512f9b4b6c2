"""Turn sequences into the next plan: admission, chunked prefill, preemption. No torch, no threads.

The policy is first come, first served (or the other choice of `admission`):

- Decoding rows go first, with one token each. The rest of the token budget goes to prompts in order of admission.
- A sequence is admitted when a row is free, and pages for all its known tokens are free. Until then no sequence
  overtakes the head of the queue, so none starves.
- A sequence starts after the longest chain of full pages that the prefix cache knows for its tokens. If this step
  itself computes much more of that chain, the sequence starts in the next step: it keeps its place in the queue, and
  others start meanwhile.
- When pages run out, the sequence that was admitted last gives up its pages and is computed again later (preemption by
  recomputation, as in vLLM). The oldest sequence is never preempted and always fits, so there is always progress.
- If rows have states, a sequence starts after the last page of that chain that has a snapshot of the states. A piece
  of a prompt ends where a snapshot is taken (see `state_snapshots`).
- While few sequences run, sequences that asked for drafts compute them (see `speculation`).

Ids are retired before they are freed: pages and rows return to their pools when the last step that may use them has
completed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from hf_async_batching.config import Admission
from hf_async_batching.core.outcomes import is_marked, is_undrawable, is_unsound, token_of
from hf_async_batching.core.plan import Given, Plan, Result
from hf_async_batching.core.request import Request
from hf_async_batching.kv_cache.kv_cache_manager import KVCacheManager
from hf_async_batching.scheduler.outputs import Settler, TokenOutput
from hf_async_batching.scheduler.plan_builder import PlanBuilder, PlannedStep
from hf_async_batching.scheduler.prefill import PrefillPlanner
from hf_async_batching.scheduler.running import RunningSequences
from hf_async_batching.scheduler.sequence import Sequence, State
from hf_async_batching.scheduler.speculation import Drafting, settle_drafts
from hf_async_batching.scheduler.waiting_queue import WaitingQueue


class Scheduler:
    """Owns the sequences, and decides which of them a step computes.

    Args:
        num_pages: KV pages that requests can own.
        page_size: Tokens per page.
        max_rows: Sequences that can hold pages at the same time.
        max_batch_tokens: Query tokens per step; at least `max_rows`.
        prefix_cache: Whether sequences share full pages of equal tokens.
        max_writes: Words that a step can send to the memories of new rows; at least as many as one row can need. None
            for no limit.
        window: Number of last tokens, its own included, that a token sees in the layers of some groups; None for all.
            Pages before the window are released while the sequence continues.
        groups: Groups of layers with separate pages; see `PageAllocator`.
        full_attention_groups: Number of leading groups whose layers see all tokens.
        snapshots: Places for snapshots of the rows' states; None for models without states.
        draft_rows: No sequence drafts while more sequences than this run; 0 for no drafts.
        admission: Order in which requests start.

    Attributes:
        kv_cache: Gives rows and pages.
        pages: The pool of pages.
        rows: The pool of rows.
        drafting: Decides which sequences draft.
        preemptions: Number of times that a sequence gave up its pages for others.
        finished: Number of requests that have ended.
        offered: Requests whose logits the last completed step offers to their choosers.
        undrawable: Requests that `complete` has ended because no token could be drawn.

    Raises:
        ValueError: `max_batch_tokens` is below `max_rows`.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_rows: int,
        max_batch_tokens: int,
        prefix_cache: bool = True,
        max_writes: int | None = None,
        window: int | None = None,
        groups: int = 1,
        full_attention_groups: int = 0,
        snapshots: int | None = None,
        draft_rows: int = 0,
        admission: Admission = "fcfs",
    ) -> None:
        if max_batch_tokens < max_rows:
            raise ValueError(f"`max_batch_tokens` ({max_batch_tokens}) must be at least `max_rows` ({max_rows})")
        self.kv_cache = KVCacheManager(
            num_pages=num_pages,
            page_size=page_size,
            max_rows=max_rows,
            prefix_cache=prefix_cache,
            window=window,
            groups=groups,
            full_attention_groups=full_attention_groups,
            snapshots=snapshots,
        )
        self.pages = self.kv_cache.pages
        self.rows = self.kv_cache.rows
        self.max_batch_tokens = max_batch_tokens
        self.drafting = Drafting(self.kv_cache, draft_rows)
        self.preemptions = 0
        self.finished = 0
        self.offered: Collection[str] = ()
        self.undrawable: list[str] = []
        self._live: dict[str, Sequence] = {}
        self._arrivals = 0
        self._waiting = WaitingQueue(admission, max_rows)
        self._running = RunningSequences(with_drafters=draft_rows > 0)
        self._builder = PlanBuilder()
        self._prefill = PrefillPlanner(
            self.kv_cache,
            self._waiting,
            self._running,
            self.drafting,
            self._builder,
            max_rows=max_rows,
            max_writes=max_writes,
            spread=admission == "longest_first",
        )
        self._in_flight: dict[int, PlannedStep] = {}
        self._settler = Settler()

    # -- what callers do ------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue.

        Raises:
            ValueError: A live request has the same id, or the request would not fit the whole cache alone.
        """
        if request.request_id in self._live:
            raise ValueError(f"request_id {request.request_id!r} is in use by a live request")
        needed = self.pages.pages_for(len(request.prompt) + request.max_new_tokens)
        if needed > self.pages.size:
            raise ValueError(f"the request needs {needed} pages, the cache has {self.pages.size}")
        sequence = Sequence(request, self._arrivals)
        self._arrivals += 1
        self._live[request.request_id] = sequence
        self._waiting.add(sequence)

    def cancel(self, request_id: str) -> TokenOutput | None:
        """End a request now. Its tokens in flight are dropped. Returns None if the request has already ended."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return None
        if sequence.row:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._finish(sequence)
        self._settler.ended_otherwise()
        return TokenOutput(request_id, None, None, "cancelled")

    def choose(self, request_id: str, token: int) -> TokenOutput | None:
        """Take the token that a chooser has chosen from a request's logits.

        Returns:
            The end of the request, if it now has all its tokens.
        """
        sequence = self._live.get(request_id)
        if sequence is None or not sequence.awaits_choice:
            return None  # it has ended in the meantime
        sequence.awaits_choice = False
        sequence.tokens.append(token)
        if not sequence.wants_more:
            ended = self.cancel(request_id)
            return ended and ended._replace(finish_reason="length")
        if sequence.state is State.DECODING:
            sequence.paused = False
            self._running.changed()
            self._builder.given.append(Given(sequence.row, token))
        return None

    def make_way(self) -> bool:
        """Preempt the youngest sequence that waits for its chooser, if others wait for a row or pages.

        Returns:
            Whether a sequence was preempted. It is computed again when its token has come.
        """
        if not any([not (sequence.has_chooser and sequence.placeholders) for sequence in self._waiting]):
            return False
        slow = next((sequence for sequence in reversed(self._running) if sequence.awaits_choice), None)
        if slow is None:
            return False
        self._preempt(slow)
        return True

    def weights_updated(self) -> None:
        """Drop cached prefixes for requests that start from now on; live requests continue with their pages."""
        self.pages.weights_updated()

    @property
    def num_running(self) -> int:
        """Sequences that hold a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, preempted ones included."""
        return len(self._waiting)

    @property
    def has_room(self) -> bool:
        """Whether a new request could start in the next step: a row is free, and no request waits for one."""
        return self.rows.available > 0 and not self._waiting

    @property
    def has_live(self) -> bool:
        """Whether there is a request that has not ended."""
        return bool(self._live)

    @property
    def waits_outside(self) -> bool:
        """Whether a chooser has logits but has not chosen yet."""
        return any([sequence.awaits_choice for sequence in self._live.values()])

    # -- one step -------------------------------------------------------------------------------------------------

    def plan(self) -> Plan | None:
        """Plan the next step; returns None if no sequence can advance before a step in flight completes."""
        builder, running = self._builder, self._running
        builder.begin()
        if running.drafters and self.drafting.choose(
            running.drafters, running=len(running), waiting=len(self._waiting)
        ):
            running.changed()
        decoding, short_of_pages = self._plan_decodes()
        admit = not short_of_pages and self.rows.available > 0 and len(self._waiting) > 0
        if admit or running.prefilling:
            self._prefill.plan(self.max_batch_tokens - len(decoding), len(decoding), admit=admit)
        if not decoding and not builder.chunks:
            return self.plan() if self._unblock() else None
        planned = builder.build(decoding)
        # Only now, after this step's look-ups: a page may be found only by later steps than the step that writes it.
        # That suffices, because steps run in the order of their plans on one stream.
        for sequence in builder.prefilled:
            self._cache_full_pages(sequence)
        plan = planned.plan
        self._in_flight[plan.step] = planned
        if plan.offers:
            self._pause([sequence for sequence in planned.sampled if sequence.has_chooser])
        return plan

    def complete(self, result: Result) -> list[TokenOutput]:
        """Settle the tokens of a step, end the requests that stop with them, and free ids that no step uses."""
        _, sampled, drafts = self._in_flight.pop(result.step)
        logprobs: list[float | None] = [None] * len(sampled)
        if result.logprobs is not None:
            logprobs[:] = result.logprobs
        tokens = result.tokens
        if drafts:
            sampled, tokens, logprobs = self.drafting.check(drafts, sampled, tokens, logprobs)
        if tokens and is_marked(min(tokens)):
            tokens = self._tokens_of(sampled, tokens)
        outputs, ended, self.offered = self._settler.settle(sampled, tokens, logprobs)
        if ended:
            for sequence in ended:
                if not sequence.row:
                    self._waiting.remove(sequence)  # preempted, and its last token was in flight
                self._finish(sequence)
            self._running.remove_finished()
        if drafts:
            settle_drafts(drafts)
            self._running.changed()
        self.kv_cache.complete(result.step)
        return outputs

    def _tokens_of(self, sampled: list[Sequence], outcomes: list[int]) -> list[int]:
        """The tokens of outcomes. Ends sequences without a token, and drops pages that hold invalid values."""
        for sequence, outcome in zip(sampled, outcomes):
            if sequence.state is State.FINISHED:
                continue
            if is_unsound(outcome):
                self.kv_cache.forget(sequence.pages, [other.pages for other in self._running])
            if is_undrawable(outcome):
                self.undrawable.append(sequence.request_id)
                self.cancel(sequence.request_id)
        return [token_of(outcome) for outcome in outcomes]

    # -- decoding, and room for it --------------------------------------------------------------------------------

    def _plan_decodes(self) -> tuple[list[Sequence], bool]:
        """The sequences that decode one token each, oldest first, and whether any of them lacks a page."""
        due = [sequence for sequence in self._running.decoding if sequence.num_computed == sequence.next_page_at]
        short = self._give_pages(due) if due else 0
        decoding = self._running.decoding
        if short:
            decoding = [sequence for sequence in decoding if sequence.num_computed < sequence.next_page_at]
        return decoding, short > 0

    def _give_pages(self, due: list[Sequence]) -> int:
        """Give a page to each decoding sequence whose pages are full; sequences at their maximum length stop decoding.

        Returns:
            The number of sequences that lack a page in this step.
        """
        growing = [sequence for sequence in due if sequence.wants_more]
        if len(growing) < len(due):
            self._running.changed()
        windowed = self.kv_cache.window is not None
        for sequence in growing:
            self._cache_full_pages(sequence)
            if windowed:
                self.kv_cache.release_before_window(sequence.pages, sequence.num_computed, sequence.last_step)
        # All at once, which is the usual case and cheap.
        entries = self.kv_cache.extend_each([sequence.pages for sequence in growing])
        if entries is None:
            return self._give_scarce_pages(growing)
        self._builder.new_pages += entries
        for sequence in growing:
            sequence.set_next_page(self.pages.room_in(len(sequence.pages.ids)))
        self._take_snapshots(growing)
        return 0

    def _give_scarce_pages(self, growing: list[Sequence]) -> int:
        """The same if pages are short: the oldest sequence gets its page first, and the youngest may be preempted."""
        short = 0
        for sequence in growing:
            if sequence.state is not State.DECODING:
                continue  # it has just given up its pages for an older sequence
            if not self._make_room(sequence, short):
                short += 1
                continue
            entries = self.kv_cache.extend_each([sequence.pages])
            assert entries is not None
            self._builder.new_pages += entries
            sequence.set_next_page(self.pages.room_in(len(sequence.pages.ids)))
            self._take_snapshots([sequence])
        return short

    def _take_snapshots(self, growing: list[Sequence]) -> None:
        """Keep the states of decoding sequences whose pages are full, before the step writes to their new pages."""
        if self.kv_cache.snapshots is not None:
            pages = [(sequence.pages, sequence.num_computed) for sequence in growing]
            self._builder.state_copies += self.kv_cache.take_decode_snapshots(pages)

    def _make_room(self, sequence: Sequence, short: int) -> bool:
        """Whether a page can be taken now. Preempts the youngest sequence if the pages about to return are not enough.

        `short` pages are reserved for older sequences that lack one in this step.
        """
        groups = self.pages.groups
        while self.pages.available < groups:
            if self.pages.available + self.kv_cache.num_coming_back >= (short + 1) * groups:
                return False
            victim = self._running.youngest
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._running.remove(sequence)
        self._retire(sequence)
        sequence.state = State.WAITING
        sequence.num_computed = 0
        sequence.paused = sequence.restarts = False
        sequence.draft = ()
        self._waiting.put_back(sequence)

    def _cache_full_pages(self, sequence: Sequence) -> None:
        """Let other sequences find pages that are full of known tokens and written by already planned steps."""
        self.kv_cache.cache_full_pages(sequence.pages, sequence.prefix_tokens, sequence.num_cacheable)

    # -- choosers outside of the engine ---------------------------------------------------------------------------

    def _unblock(self) -> bool:
        """Preempt for the head of the queue if nothing can advance: groups hold rows while other members wait.

        Requests of one group need each other's logits, so two partly running groups could wait for each other's pages.
        One group always fits alone.
        """
        if self._in_flight or not self._waiting:
            return False
        if any([s.awaits_choice and self._is_complete(s) for s in self._live.values()]):
            return False  # a chooser can continue
        group = next(iter(self._waiting)).request.group
        victim = next((s for s in reversed(self._running) if group is None or s.request.group != group), None)
        if victim is None:
            return False
        self._preempt(victim)
        return True

    def _is_complete(self, sequence: Sequence) -> bool:
        """Whether the chooser of a sequence has the logits of its whole group."""
        group = sequence.request.group
        return group is None or all([s.awaits_choice for s in self._live.values() if s.request.group == group])

    def _pause(self, sequences: Iterable[Sequence]) -> None:
        """Stop decoding sequences until their choosers have chosen."""
        for sequence in sequences:
            sequence.paused = True
        self._running.changed()

    # -- endings --------------------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence) -> None:
        self._retire(sequence)
        self.finished += 1
        sequence.state = State.FINISHED
        del self._live[sequence.request_id]

    def _retire(self, sequence: Sequence) -> None:
        """Take row and pages from the sequence; they return to their pools when its last step has completed."""
        if sequence.row:
            self._cache_full_pages(sequence)
            self.kv_cache.retire(sequence.pages, sequence.last_step)

    def let_go(self) -> None:
        """Drop references to ended requests, for an engine that waits. Does nothing while a request is live."""
        if not self._live:
            self._running.let_go()
            self._builder.let_go()
            self._settler.let_go()

    def check_invariants(self) -> None:
        """Check that pages and rows are returned, and the order of the queues.

        Raises:
            AssertionError: The bookkeeping is broken.
        """
        self.kv_cache.check_invariants((sequence.pages, sequence.num_computed) for sequence in self._running)
        self._waiting.check_invariants()
        self._running.check_invariants()
