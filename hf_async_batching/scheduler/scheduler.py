"""Turns sequences into the next plan: admission, chunked prefill, preemption. No torch, no threads.

The policy is first come, first served (or `admission`'s other one), and every choice follows from it:

- Decoding rows go first, one token each; what is left of the token budget goes to prompts in order of admission.
- A sequence is admitted when a row is free and pages for all its known tokens are; nobody overtakes the head of the
  queue when these are short, so nobody starves.
- A sequence starts after the longest chain of full pages that the prefix cache knows for its tokens. Where the step
  itself computes much more of that chain, it starts with the next one; it keeps its place, and others start meanwhile.
- When pages run out, the sequence that was admitted last gives up its pages and is computed again later (preemption by
  recomputation, as in vLLM). The oldest is never the victim and always fits, so there is always progress.
- While few sequences run, those that asked for it compute drafts (see `drafting`).

Ids are retired, not freed: pages and rows return to their pools when the last step that could touch them completed.
"""

from __future__ import annotations

from typing import NamedTuple

from hf_async_batching.config import Admission
from hf_async_batching.core.graph_buckets import padded_decodes, spread_room
from hf_async_batching.core.outcomes import is_undrawable, is_unsound, token_of
from hf_async_batching.core.plan import NO_BOUNDS, Chunk, Features, Given, NewPage, NewRow, Offer, Plan, Result, Run
from hf_async_batching.core.request import Request
from hf_async_batching.kv_cache.page_allocator import IdPool, PageAllocator
from hf_async_batching.kv_cache.prefix_cache import Node
from hf_async_batching.scheduler.outputs import Emission, Steady, emission
from hf_async_batching.scheduler.prompt_lookup import MAX_DRAFTED
from hf_async_batching.scheduler.sequence import Sequence, State
from hf_async_batching.scheduler.speculation import Drafted, Drafting, settle_drafts
from hf_async_batching.scheduler.step_features import features_of, rare_needs
from hf_async_batching.scheduler.waiting_queue import (
    MOST_PASSED,
    WaitingQueue,
    found_a_step_later,
    spread_budget,
)


class _Retired(NamedTuple):
    """What a sequence has let go of; `row` is 0 where it goes on without the pages."""

    last_step: int
    row: int
    pages: list[int]


class Scheduler:
    """Owns the sequences, the pages and the rows.

    Args:
        num_pages: KV pages that requests can own.
        page_size: Tokens per page.
        max_rows: Sequences that can hold pages at the same time.
        max_batch_tokens: Query tokens per step; at least `max_rows`.
        prefix_cache: Whether sequences share full pages of equal tokens.
        max_writes: Words that a step can send to the memories of new rows; no fewer than one row can need. None is
            for no bound.
        window: How many of the last tokens, its own included, a token sees in the layers of some groups; None for all.
            Pages that no token to come sees are given back while their sequence goes on.
        groups: Groups of layers, each with pages of its own; see `PageAllocator`.
        kept: How many of the first groups see all tokens.
        draft_rows: Nobody drafts while more sequences than this run; 0 is never.
        admission: In which order requests start.

    Attributes:
        offered: Requests whose logits the step that completed last has brought for their choosers.
        undrawable: Requests that `complete` has ended because no token could be drawn for them.
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
        kept: int = 0,
        draft_rows: int = 0,
        admission: Admission = "fcfs",
    ) -> None:
        if max_batch_tokens < max_rows:
            raise ValueError(f"`max_batch_tokens` ({max_batch_tokens}) must be at least `max_rows` ({max_rows})")
        self.pages = PageAllocator(num_pages, page_size, prefix_cache, groups=groups, kept=kept, window=window)
        self.rows = IdPool(max_rows, "row")
        self.max_batch_tokens = max_batch_tokens
        self.max_writes = max_writes
        self.drafting = Drafting(self.pages, draft_rows)
        self.preemptions = 0
        self.finished = 0
        self.undrawable: list[str] = []
        self._waiting = WaitingQueue(admission, max_rows)
        self._spreads = admission == "longest_first"
        self._padded_decodes = padded_decodes(max_rows)
        self._running: list[Sequence] = []  # in the order of their admission
        self._live: dict[str, Sequence] = {}
        self._retired: list[_Retired] = []
        self._sampled: dict[int, list[Sequence]] = {}  # step in flight -> whose tokens it brings, in plan order
        self._drafts: dict[int, list[Drafted]] = {}  # step in flight -> the drafts in it
        self._step = 0
        self._completed = -1
        self._arrivals = 0
        # What follows from the running sequences, kept from step to step until `_regroup` is due. The lists are
        # replaced and never changed, so that a step in flight can hold one.
        self._regroup_due = False
        self._decoding: list[Sequence] = []
        self._prefilling: list[Sequence] = []
        self._drafters: list[Sequence] = []
        self._were_few = False
        self._planned_decoding: list[Sequence] = []
        self._decode_rows: tuple[int, ...] = ()
        self._planned_sampled: list[Sequence] = []
        self._had_prefills = False
        self._features = Features()
        self._decode_context = 0
        self._settled: list[Sequence] = []
        self.offered: list[str] = []
        self._chosen: list[Given] = []  # tokens from outside, for rows that decode with them in the next step
        self._steady: Steady | None = None

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

    def cancel(self, request_id: str) -> Emission | None:
        """End a request now. Its tokens in flight are dropped. Returns None where the request has ended already."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return None
        if sequence in self._running:
            self._running.remove(sequence)
            self._regroup_due = True
        else:
            self._waiting.remove(sequence)
        return self._finish(sequence, None, None, "cancelled")

    def choose(self, request_id: str, token: int) -> Emission | None:
        """Take the token that a chooser has chosen for a request whose logits it was offered.

        Returns:
            The end of a request that has all its tokens now.
        """
        sequence = self._live.get(request_id)
        if sequence is None or not sequence.offered:
            return None  # it has ended meanwhile
        sequence.offered = False
        sequence.tokens.append(token)
        if not sequence.wants_more:
            ended = self.cancel(request_id)
            return ended and ended._replace(finish_reason="length")
        if sequence.state is State.DECODING:
            sequence.held = False
            self._regroup_due = True
            self._chosen.append(Given(sequence.row, token))
        return None

    def make_way(self) -> bool:
        """Preempt the youngest sequence whose chooser has not chosen yet, where others wait for a row or pages.

        Returns:
            Whether one was preempted. It is computed again once its token has come.
        """
        if not any([not (sequence.chosen_outside and sequence.placeholders) for sequence in self._waiting]):
            return False
        slow = next((sequence for sequence in reversed(self._running) if sequence.offered), None)
        if slow is None:
            return False
        self._preempt(slow)
        return True

    def weights_updated(self) -> None:
        """Requests that start from now on find nothing that was computed before; live ones go on with their pages."""
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
        """Whether a request that came now could start with the next step: a row is free, and nobody waits for one."""
        return self.rows.available > 0 and not self._waiting

    @property
    def has_live(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._live)

    @property
    def waits_outside(self) -> bool:
        """Whether a chooser has logits and has not chosen yet."""
        return any([sequence.offered for sequence in self._live.values()])

    def state_of(self, request_id: str) -> State:
        """The state of a request; FINISHED for one that the scheduler no longer knows."""
        sequence = self._live.get(request_id)
        return State.FINISHED if sequence is None else sequence.state

    # -- one step -------------------------------------------------------------------------------------------------

    def plan(self) -> Plan | None:
        """The next step, or None where no sequence can move before a step in flight completes."""
        new_rows: list[NewRow] = []
        new_pages: list[NewPage] = []
        if self._regroup_due:
            self._regroup()
        if self._drafters:
            self._choose_drafts()
        decoding, short_of_pages = self._plan_decodes(new_pages)
        budget = self.max_batch_tokens - len(decoding)
        # Drafts are no prompts, and their rows would wait.
        drafts = self._drafters and any(sequence.restarts for sequence in self._prefilling)
        if self._spreads and not drafts and len(self._waiting) <= self.rows.available:
            room = spread_room(self._padded_decodes, len(decoding))
            budget = spread_budget(budget, self._running, self._waiting, room=room)
        chunks, prefilled = self._plan_prefills(budget, new_rows, new_pages)
        budget -= sum(len(chunk.tokens) for chunk in chunks)
        if not short_of_pages:
            admitted, joined = self._admit(budget, new_rows, new_pages, prefilled)
            chunks += admitted
            prefilled += joined
        if not decoding and not chunks:
            return self.plan() if self._unblock() else None

        self._decode_context += len(decoding)  # where they are those of the step before: each is one token longer
        if decoding is not self._planned_decoding:
            self._planned_decoding = decoding
            self._decode_context = sum([sequence.computed + 1 for sequence in decoding])
            rows = tuple([sequence.row for sequence in decoding])
            if rows != self._decode_rows:
                self._decode_rows = rows
        step, sampled = self._step, decoding
        for sequence in decoding:
            sequence.computed += 1
            sequence.planned += 1
            sequence.last_step = step
        for sequence, chunk in zip(prefilled, chunks, strict=True):
            sequence.planned += chunk.samples
            sequence.last_step = step
        if any([chunk.samples for chunk in chunks]):
            sampled = decoding[:]
            for sequence, chunk in zip(prefilled, chunks, strict=True):
                if chunk.samples > 1:
                    self._drafts.setdefault(step, []).append(Drafted(sequence, len(sampled), sequence.draft))
                sampled += [sequence] * chunk.samples
        # A minimum length wears off as tokens are planned; all else changes with the sequences only.
        if prefilled or self._had_prefills or sampled is not self._planned_sampled or self._features.min_length:
            self._planned_sampled, self._had_prefills = sampled, bool(prefilled)
            self._features = features_of(sampled, prefilled)
        offers: tuple[Offer, ...] = ()
        wanted: tuple[Run, ...] = ()
        bounds = NO_BOUNDS
        if self._features.eager:
            offers, wanted, bounds = rare_needs(sampled)
        # Only now, when this step's look-ups are over: a page must be found by later steps than the one that writes
        # it. That suffices, because steps run in the order of their plans on one stream.
        for sequence in prefilled:
            self._enter_pages(sequence)
        self._sampled[step] = sampled
        context = self._decode_context + sum([sequence.computed for sequence in prefilled])
        plan = Plan(
            step,
            self._decode_rows,
            tuple(chunks),
            tuple(new_rows),
            tuple(new_pages),
            self._features,
            context,
            tuple(self._chosen),
            offers,
            wanted,
            bounds,
        )
        self._step += 1
        self._chosen.clear()
        if offers:
            self._hold([sequence for sequence in sampled if sequence.chosen_outside])
        return plan

    def _unblock(self) -> bool:
        """Preempt for the head of the queue where nothing can move: groups hold rows whose other members wait.

        Requests of one group need each other's logits, so that two groups that are running in part could wait for
        each other's pages. One group always fits alone.
        """
        if self._completed != self._step - 1 or not self._waiting:
            return False
        if any([s.offered and self._is_complete(s) for s in self._live.values()]):
            return False  # a chooser goes on
        group = next(iter(self._waiting)).request.group
        victim = next((s for s in reversed(self._running) if group is None or s.request.group != group), None)
        if victim is None:
            return False
        self._preempt(victim)
        return True

    def _is_complete(self, sequence: Sequence) -> bool:
        """Whether the chooser of a sequence has the logits of its whole group."""
        group = sequence.request.group
        return group is None or all([s.offered for s in self._live.values() if s.request.group == group])

    def _hold(self, sequences: list[Sequence]) -> None:
        """Let sequences decode no further until their choosers have chosen."""
        for sequence in sequences:
            sequence.held = True
        self._regroup_due = True

    def complete(self, result: Result) -> list[Emission]:
        """Settle the tokens of a step, end the requests that stop with them, and free what nothing can touch."""
        sampled = self._sampled.pop(result.step)
        logprobs: list[float | None] = [None] * len(sampled)
        if result.logprobs is not None:
            logprobs[:] = result.logprobs
        tokens = result.tokens
        drafts = self._drafts.pop(result.step, ()) if self._drafts else ()
        if drafts:
            sampled, tokens, logprobs = self.drafting.check(drafts, sampled, tokens, logprobs)
        self.offered = []
        if tokens and min(tokens) < 0:
            tokens = self._tokens_of(sampled, tokens)
        emissions = self._settle(sampled, tokens, logprobs)
        if drafts:
            settle_drafts([draft.sequence for draft in drafts])
            self._regroup_due = True
        self._completed = result.step
        if self._retired:
            self._release_retired()
        return emissions

    def _tokens_of(self, sampled: list[Sequence], outcomes: list[int]) -> list[int]:
        """The tokens of outcomes; ends sequences that have none, and forgets pages that are not sound."""
        for sequence, outcome in zip(sampled, outcomes, strict=True):
            if outcome >= 0 or sequence.state is State.FINISHED:
                continue
            if is_unsound(outcome):
                self._forget_pages(sequence)
            if is_undrawable(outcome):
                self.undrawable.append(sequence.request_id)
                self.cancel(sequence.request_id)
        return [token_of(outcome) for outcome in outcomes]

    def _forget_pages(self, sequence: Sequence) -> None:
        """Let no sequence that starts from now on find what this one has computed or began with.

        Which page is at fault is not known, so that the whole chain goes, and what continues it.
        """
        if sequence.prefix is not None:
            self.pages.forget(sequence.prefix)
        sequence.shareable = False
        for other in self._running:
            if other.prefix is not None and not other.prefix.known:
                other.shareable = False  # it would make the pages known again

    def _settle(self, sampled: list[Sequence], new: list[int], logprobs: list[float | None]) -> list[Emission]:
        steady = self._steady
        if steady is not None and steady.sequences is sampled:
            settled = steady.settle(new, logprobs)
            if settled is not None:
                return settled
        emissions: list[Emission] = []
        ended = False
        finished = State.FINISHED
        for sequence, token, logprob in zip(sampled, new, logprobs, strict=True):
            if sequence.state is finished:
                continue  # a surplus token: the request ended while this step was in flight
            if sequence.chosen_outside:
                sequence.offered = True
                self.offered.append(sequence.request_id)
                continue
            tokens = sequence.tokens
            tokens.append(token)
            if token not in sequence.eos and len(tokens) < sequence.max_length:
                emissions.append(emission((sequence.request_id, token, logprob, None)))
                continue
            if sequence.state is State.WAITING:
                self._waiting.remove(sequence)  # preempted, and its last token was in flight
            reason = "eos" if token in sequence.eos else "length"
            emissions.append(self._finish(sequence, token, logprob, reason))
            ended = True
        if ended:
            self._running = [sequence for sequence in self._running if sequence.state is not finished]
            self._regroup_due = True
        if not ended:
            # Those who are settled together a second time will be many times more.
            again = sampled and sampled is self._settled and all([s.state is not finished for s in sampled])
            self._steady = Steady(sampled) if again else None
            self._settled = sampled
        return emissions

    # -- planning -------------------------------------------------------------------------------------------------

    def _choose_drafts(self) -> None:
        """Let sequences that can draft do so, or go on as the others do."""
        few = not self._waiting and len(self._running) <= self.drafting.max_rows
        if few or self._were_few:  # else nobody is held or has a draft to give up
            self._regroup_due |= self.drafting.choose(self._drafters, few)
        self._were_few = few

    def _plan_decodes(self, new_pages: list[NewPage]) -> tuple[list[Sequence], bool]:
        """The sequences that decode one token each, oldest first, and whether any lacks a page."""
        if self._regroup_due:
            self._regroup()
        due = [sequence for sequence in self._decoding if sequence.computed == sequence.decide_at]
        short = self._give_pages(due, new_pages) if due else 0
        if self._regroup_due:
            self._regroup()
        decoding = self._decoding
        if short:
            decoding = [sequence for sequence in decoding if sequence.computed < sequence.decide_at]
        return decoding, short > 0

    def _give_pages(self, due: list[Sequence], new_pages: list[NewPage]) -> int:
        """A page for each decoding sequence whose pages are full; those at their length decode no more.

        Returns:
            How many go without a page in this step.
        """
        growing = [sequence for sequence in due if sequence.wants_more]
        if len(growing) < len(due):
            self._regroup_due = True
        for sequence in growing:
            self._enter_pages(sequence)
            if self.pages.prefixes.window is not None:
                self._give_back_passed(sequence)
        groups = self.pages.groups
        pages = self.pages.take(len(growing) * groups)  # all at once, which is the rule, and cheap
        short = 0
        for i, sequence in enumerate(growing):
            if pages is not None:
                taken = pages[i * groups : (i + 1) * groups]
            elif sequence.state is not State.DECODING:
                continue  # it gave up its pages for an older one just now
            elif self._make_room(sequence, short):
                more = self.pages.take(groups)
                assert more is not None
                taken = more
            else:
                short += 1
                continue
            for page in taken:
                new_pages.append(NewPage(sequence.row, len(sequence.pages), page))
                sequence.pages.append(page)
            sequence.decide_later(self.pages.room_in(len(sequence.pages)))
        return short

    def _regroup(self) -> None:
        """Sort the running sequences, both kinds by admission: those that decode, those whose prompts are computed."""
        decoding, prefilling = State.DECODING, State.PREFILLING
        self._decoding = [s for s in self._running if s.state is decoding and s.wants_more and not s.held]
        self._prefilling = [s for s in self._running if s.state is prefilling]
        if self.drafting.max_rows:
            self._drafters = [s for s in self._running if s.lookup is not None]
        self._regroup_due = False

    def _make_room(self, sequence: Sequence, short: int) -> bool:
        """Whether a page can be taken now. Preempts the youngest where the pages on their way back are not enough.

        `short` pages are spoken for by older sequences that go without in this step.
        """
        groups = self.pages.groups
        while self.pages.available < groups:
            on_their_way = self.pages.num_coming_back(page for retired in self._retired for page in retired.pages)
            if self.pages.available + on_their_way >= (short + 1) * groups:
                return False
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._running.remove(sequence)
        self._regroup_due = True
        self._retire(sequence)
        sequence.state = State.WAITING
        sequence.computed = 0
        sequence.held = sequence.restarts = False
        sequence.draft = ()
        self._waiting.put_back(sequence)

    def _plan_prefills(
        self, budget: int, new_rows: list[NewRow], new_pages: list[NewPage]
    ) -> tuple[list[Chunk], list[Sequence]]:
        """Pieces of prompts that are under way, and drafts."""
        can_draft = MAX_DRAFTED
        chunks: list[Chunk] = []
        prefilled: list[Sequence] = []
        for sequence in self._prefilling:
            if budget == 0:
                break
            if self.pages.prefixes.window is not None:
                self._give_back_passed(sequence)
            if sequence.restarts:
                self.drafting.begin(sequence, min(can_draft, budget - 1), new_pages)
                can_draft -= len(sequence.draft)
                new_rows.append(NewRow(sequence.row, sequence.request, sequence.computed, again=True))
            chunk = self._next_chunk(sequence, budget)
            budget -= len(chunk.tokens)
            chunks.append(chunk)
            prefilled.append(sequence)
        return chunks, prefilled

    def _admit(
        self, budget: int, new_rows: list[NewRow], new_pages: list[NewPage], under_way: list[Sequence]
    ) -> tuple[list[Chunk], list[Sequence]]:
        """First pieces of prompts; `under_way` are the sequences of which the step computes later ones."""
        chunks: list[Chunk] = []
        prefilled: list[Sequence] = []
        writes = passed = 0
        waiting = tuple(self._waiting) if budget > 0 and self.rows.available else ()
        for sequence in waiting:
            if budget <= 0 or not self.rows.available or passed == MOST_PASSED:
                break
            if sequence.chosen_outside and sequence.placeholders:
                passed += 1
                continue  # preempted while its chooser chooses, for which the others do not wait
            if sequence.placeholders:
                break  # preempted with tokens in flight: it is computed again from tokens that are not known yet
            # Where it waits on, the next look-up goes on from here.
            # Of a prompt of embeddings the tokens say nothing: it starts at the root, and nobody finds its pages.
            looked_up = sequence.tokens if sequence.shareable else sequence.tokens[:1]
            sequence.found = self.pages.prefixes.find(sequence.found, looked_up)
            sequence.prefix = self.pages.prefixes.usable(sequence.found)
            if self.pages.prefixes.enabled and found_a_step_later(
                sequence, [*under_way, *prefilled], self.pages.page_size
            ):
                passed += 1
                continue
            shared = self._path_to(sequence.prefix)
            # One page beyond the known tokens, so that it is not preempted again by its own first token.
            needed = self.pages.pages_for(len(sequence.tokens) + 1)
            needed -= self.pages.num_held(shared) + shared.count(0)
            if needed > self.pages.available:
                break
            # Rows that share pages have more entries in a step than there are pages, which a step's buffers hold.
            if len(new_pages) + self.pages.pages_for(len(sequence.tokens)) > self.pages.size:
                break
            words = sequence.writes(self.pages.room_in(len(shared)))
            if words and self.max_writes is not None and writes + words > self.max_writes:
                break
            writes += words
            self._waiting.remove(sequence)
            self._start(sequence, shared)
            known = tuple(sequence.tokens[: sequence.computed]) if words else ()
            new_rows.append(NewRow(sequence.row, sequence.request, sequence.computed, known))
            new_pages += [NewPage(sequence.row, index, page) for index, page in enumerate(sequence.pages)]
            chunk = self._next_chunk(sequence, budget)
            budget -= len(chunk.tokens)
            chunks.append(chunk)
            prefilled.append(sequence)
        return chunks, prefilled

    def _start(self, sequence: Sequence, shared: list[int]) -> None:
        row = self.rows.take(1)
        # Held before others are taken, which may evict what nobody holds.
        self.pages.share(shared)
        own = self.pages.take(self.pages.pages_for(len(sequence.tokens)) - len(shared))
        assert row is not None and own is not None
        sequence.row = row[0]
        sequence.pages = shared + own
        sequence.computed = self.pages.room_in(len(shared))
        sequence.passed = shared.count(0) and self.pages.prefixes.num_passed(sequence.computed)
        sequence.state = State.PREFILLING
        self._running.append(sequence)
        if sequence.last_step < 0:  # one that was preempted has been counted
            self.pages.prefixes.count(len(sequence.tokens), sequence.computed)

    def _enter_pages(self, sequence: Sequence) -> None:
        """Let others find the pages that are full of known tokens and written by steps planned before."""
        assert sequence.prefix is not None
        if not sequence.shareable:
            return
        gone = sequence.passed and not self.pages.kept
        if gone and not (sequence.prefix.known and sequence.prefix.depth >= sequence.passed):
            return  # some of the pages in between are gone
        # The last known output may be an end, whose own keys and values no step need ever write.
        known = max(len(sequence.request.prompt), len(sequence.tokens) - 1)
        full = min(sequence.computed, known) // self.pages.page_size
        sequence.prefix = self.pages.prefixes.enter(sequence.prefix, sequence.tokens, sequence.pages, full)

    def _give_back_passed(self, sequence: Sequence) -> None:
        """Let go of the pages that lie before the window of the next token to compute.

        Steps in flight may still read them: they return when the last one that was planned has completed.
        """
        passed = self.pages.prefixes.num_passed(sequence.computed)
        if passed > sequence.passed:
            groups, kept = self.pages.groups, self.pages.kept
            pages: list[int] = []
            for start in range(sequence.passed * groups, passed * groups, groups):
                pages += sequence.pages[start + kept : start + groups]
                sequence.pages[start + kept : start + groups] = [0] * (groups - kept)
            sequence.passed = passed
            self._retired.append(_Retired(sequence.last_step, 0, pages))
            self._release_retired()

    def _path_to(self, node: Node) -> list[int]:
        """The pages that a sequence shares which starts behind a node; 0 for those that it never sees."""
        pages = node.path()
        groups, kept = self.pages.groups, self.pages.kept
        if groups > 1:
            passed = self.pages.prefixes.num_passed(self.pages.room_in(len(pages)))
            for start in range(0, passed * groups, groups):
                pages[start + kept : start + groups] = [0] * (groups - kept)
        return pages

    def _next_chunk(self, sequence: Sequence, budget: int) -> Chunk:
        self._regroup_due = True
        start = sequence.computed
        if sequence.draft:
            piece = (*sequence.tokens[start:], *sequence.draft)
            sequence.computed += len(piece)
            sequence.state = State.VERIFYING
            return Chunk(sequence.row, piece, len(piece))
        end = min(start + budget, len(sequence.tokens))
        sequence.computed = end
        samples = end == len(sequence.tokens)
        if samples:
            sequence.state = State.DECODING
            sequence.decide_later(self.pages.room_in(len(sequence.pages)))
        return Chunk(sequence.row, tuple(sequence.tokens[start:end]), int(samples))

    # -- endings --------------------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, token: int | None, logprob: float | None, reason: str) -> Emission:
        self._retire(sequence)
        self._steady = None
        self.finished += 1
        sequence.state = State.FINISHED
        del self._live[sequence.request.request_id]
        return Emission(sequence.request.request_id, token, logprob, reason)

    def _retire(self, sequence: Sequence) -> None:
        """Take row and pages from the sequence; they return to their pools once its last step has completed."""
        if sequence.row:
            self._enter_pages(sequence)
            pages = [page for page in sequence.pages if page] if sequence.passed else sequence.pages
            self._retired.append(_Retired(sequence.last_step, sequence.row, pages))
            sequence.row = 0
            sequence.pages = []
            sequence.passed = 0
            self._release_retired()

    def _release_retired(self) -> None:
        keep: list[_Retired] = []
        for retired in self._retired:
            if retired.last_step <= self._completed:
                # One that goes on has its place in the tree, and touches it when it ends.
                self.pages.release(retired.pages, touch=retired.row > 0 or not self.pages.kept)
                if retired.row:
                    self.rows.release([retired.row])
            else:
                keep.append(retired)
        self._retired = keep

    def let_go(self) -> None:
        """Hold no request that has ended; for an engine that waits. Without effect while a request is live."""
        if not self._live:
            self._decoding, self._prefilling, self._drafters = [], [], []
            self._planned_decoding, self._planned_sampled, self._settled = [], [], []

    def check_invariants(self) -> None:
        """Pages in = pages out, rows in = rows out, and the order of the queues.

        Raises:
            AssertionError: The bookkeeping is broken.
        """
        held_pages = [page for sequence in self._running for page in sequence.pages if page]
        held_pages += [page for retired in self._retired for page in retired.pages]
        held_rows = [sequence.row for sequence in self._running]
        held_rows += [retired.row for retired in self._retired if retired.row]
        self.pages.check_invariants(held_pages)
        assert len(held_rows) == len(set(held_rows)) == self.rows.in_use, "rows in != rows out"
        assert 0 not in held_rows, "the padding row was handed out"
        for sequence in self._running:
            to_write = sequence.pages[self.pages.groups * (sequence.computed // self.pages.page_size) :]
            assert 0 not in to_write, "a page that will be written was given back"
            assert self.pages.are_own(to_write), "a page that is shared, or can be, will be written"
        self._waiting.check_invariants()
        assert all(sequence.computed <= self.pages.room_in(len(sequence.pages)) for sequence in self._running), (
            "a token without a page"
        )
        assert all(
            sequence.computed + 1 == sequence.planned for sequence in self._running if sequence.state is State.DECODING
        ), "a token that no step computes, or that two do"
        assert all(not sequence.held or sequence.state is State.DECODING for sequence in self._running), (
            "a sequence is held that does not decode"
        )
