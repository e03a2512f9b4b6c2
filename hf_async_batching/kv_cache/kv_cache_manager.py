"""Give rows and KV pages to sequences, share pages between them, and take both back. Integers only.

Rows and pages are *retired* before they are freed: they return to their pools when the last step that may use them has
completed. The manager knows the pages of a sequence (`SequencePages`), but not the sequence: callers pass its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hf_async_batching.core.plan import NewPage, StateCopy
from hf_async_batching.kv_cache.id_pool import IdPool
from hf_async_batching.kv_cache.page_allocator import PageAllocator
from hf_async_batching.kv_cache.sequence_pages import PendingSnapshot, SequencePages
from hf_async_batching.kv_cache.state_snapshots import WORTH_A_COPY, WORTH_A_PIECE, SnapshotPool


class _Retired(NamedTuple):
    """Pages, and perhaps a row, that wait for a step; `row` is 0 if the sequence continues without the pages."""

    last_step: int
    row: int
    pages: list[int]


class KVCacheManager:
    """Owns the rows and the KV pages.

    Args:
        num_pages: KV pages that requests can own.
        page_size: Tokens per page.
        max_rows: Sequences that can hold pages at the same time.
        prefix_cache: Whether sequences share full pages of equal tokens.
        window: Number of last tokens, its own included, that a token sees in the layers of some groups; None for all.
            Pages before the window are released while the sequence continues.
        groups: Groups of layers with separate pages; see `PageAllocator`.
        full_attention_groups: Number of leading groups whose layers see all tokens.
        snapshots: Places for snapshots of the rows' states; None for models without states. With 0 there is no
            prefix cache.

    Attributes:
        snapshots: The pool of snapshots; None without a prefix cache, and for models without states.
        pages: The pool of pages, and the prefix cache.
        rows: The pool of rows.
        window: The argument.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_rows: int,
        prefix_cache: bool = True,
        window: int | None = None,
        groups: int = 1,
        full_attention_groups: int = 0,
        snapshots: int | None = None,
    ) -> None:
        prefix_cache = prefix_cache and snapshots != 0
        self.snapshots = SnapshotPool(snapshots) if snapshots and prefix_cache else None
        self.pages = PageAllocator(
            num_pages,
            page_size,
            prefix_cache,
            groups=groups,
            full_attention_groups=full_attention_groups,
            window=window,
            snapshots=self.snapshots,
        )
        self.rows = IdPool(max_rows, "row")
        self.window = window
        self._retired: list[_Retired] = []
        self._completed = -1

    # -- a sequence starts --------------------------------------------------------------------------------------------

    def match_prefix(self, pages: SequencePages, tokens: Sequence[int]) -> None:
        """Set `matched_node` and `last_node` by the longest chain of known pages that `tokens` begin with."""
        # The tokens of a prompt of embeddings do not determine its pages, so the sequence starts at the root.
        known = tokens if pages.shareable else tokens[:1]
        pages.matched_node = self.pages.prefixes.find(pages.matched_node, known)
        pages.last_node = self.pages.prefixes.usable(pages.matched_node)

    def shared_pages(self, pages: SequencePages) -> list[int]:
        """The pages that a sequence shares if it starts after its `last_node`; 0 for pages before its window."""
        assert pages.last_node is not None
        shared = pages.last_node.path()
        groups, full = self.pages.groups, self.pages.full_attention_groups
        if groups > 1:
            before = self.pages.prefixes.pages_before_window(self.pages.room_in(len(shared)))
            for start in range(0, before * groups, groups):
                shared[start + full : start + groups] = [0] * (groups - full)
        return shared

    def can_allocate(self, num_tokens: int, shared: list[int]) -> bool:
        """Whether there are enough pages now for a sequence of `num_tokens` tokens that shares some of them."""
        # One more token, so that the sequence is not preempted by its own first token.
        needed = self.pages.pages_for(num_tokens + 1) - self.pages.num_held(shared) - shared.count(0)
        return needed <= self.pages.available

    def allocate(self, pages: SequencePages, num_tokens: int, shared: list[int]) -> list[NewPage]:
        """Give a row and pages to a sequence that has none. `can_allocate` must hold, and a row must be free.

        Args:
            pages: Pages of the sequence.
            num_tokens: Number of its known tokens.
            shared: Result of `shared_pages`.

        Returns:
            The entries of the device's page table that the next step must set.
        """
        row = self.rows.take(1)
        # Hold the shared pages before taking others, which may evict pages without a holder.
        self.pages.share(shared)
        own = self.pages.take(self.pages.pages_for(num_tokens) - len(shared))
        assert row is not None and own is not None
        pages.row = row[0]
        if 0 in shared:
            pages.pages_before_window = self.pages.prefixes.pages_before_window(self.pages.room_in(len(shared)))
        return pages.append(shared + own)

    def begin_states(self, pages: SequencePages, num_tokens: int) -> StateCopy | None:
        """Begin with the states of the sequence's `last_node`, and choose where to take snapshots of its prompt.

        Snapshots are taken where the known pages that the prompt begins with end, because other prompts go on there in
        other ways; and at the end of the prompt, for requests that repeat or continue it. A prompt that begins with no
        known page has none: nothing says that its tokens come again, and its decode snapshots cost no step.

        Args:
            pages: Pages of the sequence; `allocate` has given them.
            num_tokens: Number of its known tokens.

        Returns:
            The copy of the states that the next step must make; None if the sequence begins without any.
        """
        assert pages.last_node is not None and pages.matched_node is not None
        if self.snapshots is None:
            return None
        size = self.pages.page_size
        pages.last_snapshot = at = pages.last_node.depth * size
        # At least one token is left over, as in a look-up: the same prompt finds the snapshot too.
        for border in (pages.matched_node.depth * size, (num_tokens - 1) // size * size):
            if pages.matched_node.depth and border - at >= WORTH_A_PIECE:
                pages.borders.append(border)
                at = border
        if not pages.last_node.snapshot:
            return None
        self.snapshots.use(pages.last_node)
        return StateCopy(-pages.last_node.snapshot, pages.row)

    # -- a sequence continues -----------------------------------------------------------------------------------------

    def extend_each(self, sequences: Sequence[SequencePages]) -> list[NewPage] | None:
        """Give each sequence one page of every group; None, without any change, if too few pages are available."""
        groups = self.pages.groups
        taken = self.pages.take(len(sequences) * groups)
        if taken is None:
            return None
        entries: list[NewPage] = []
        for pages, start in zip(sequences, range(0, len(taken), groups), strict=True):
            entries += pages.append(taken[start : start + groups])
        return entries

    def extend_to(self, pages: SequencePages, num_tokens: int) -> list[NewPage] | None:
        """Give a sequence its missing pages for `num_tokens` tokens; None, without any change, if too few are free."""
        missing = self.pages.pages_for(num_tokens) - len(pages.ids)
        if missing <= 0:
            return []
        taken = self.pages.take(missing)
        return None if taken is None else pages.append(taken)

    def take_snapshot(self, pages: SequencePages, position: int) -> StateCopy | None:
        """Take a snapshot of a prompt's states, if the next position to compute is one of the sequence's borders.

        Returns:
            The copy that the next step must make; None for no snapshot, or if another sequence has taken it.
        """
        if not pages.borders or pages.borders[0] != position:
            return None
        del pages.borders[0]
        node = pages.last_node
        if node is not None and node.snapshot and node.depth * self.pages.page_size == position:
            pages.last_snapshot = position
            return None
        return self._take_snapshot(pages, position, replaces=False)

    def take_decode_snapshots(self, sequences: Iterable[tuple[SequencePages, int]]) -> list[StateCopy]:
        """Take snapshots of sequences that decode, whose pages are full and whose last snapshot is long ago.

        Args:
            sequences: Their pages, and the position of the next token to compute: a multiple of the page size.

        Returns:
            The copies that the next step must make.
        """
        # A row needs two places at times. With fewer, decoding rows would only displace each other's snapshots.
        if self.snapshots is None or self.snapshots.size < 2 * self.rows.in_use:
            return []
        copies = [
            self._take_snapshot(pages, position, replaces=True)
            for pages, position in sequences
            if position - pages.last_snapshot >= WORTH_A_COPY
        ]
        return [copy for copy in copies if copy is not None]

    def _take_snapshot(self, pages: SequencePages, position: int, *, replaces: bool) -> StateCopy | None:
        assert self.snapshots is not None and pages.last_node is not None
        if not pages.shareable or not self.pages.prefixes.is_current(pages.last_node):
            return None
        place = self.snapshots.take()
        if place is None:
            return None
        pages.pending.append(PendingSnapshot(position, place, replaces))
        pages.last_snapshot = position
        return StateCopy(pages.row, -place)

    def _attach_snapshots(self, pages: SequencePages, full: int) -> None:
        """Let other sequences find the snapshots after the first `full` pages, or after fewer of them."""
        assert self.snapshots is not None
        waiting: list[PendingSnapshot] = []
        for snapshot in pages.pending:
            depth = snapshot.position // self.pages.page_size
            if depth > full:
                waiting.append(snapshot)
                continue
            node = pages.last_node
            while node is not None and node.depth > depth:
                node = node.parent
            assert node is not None
            if node.snapshot or not self.pages.prefixes.is_current(node):
                self.snapshots.give_back([snapshot.place])
                continue
            self.snapshots.attach(node, snapshot.place)
            if snapshot.replaces:
                before, pages.replaceable = pages.replaceable, node
                if before is not None and len(before.children) < 2:
                    self.snapshots.drop(before)
        pages.pending = waiting

    def cache_full_pages(self, pages: SequencePages, tokens: Sequence[int], num_written: int) -> None:
        """Let other sequences find the full pages of the first `num_written` tokens.

        Args:
            pages: Pages of the sequence.
            tokens: Its known tokens.
            num_written: Number of leading tokens whose keys and values are written by steps that are already planned.
        """
        last = pages.last_node
        assert last is not None
        if not pages.shareable:
            return
        before = 0 if self.pages.full_attention_groups else pages.pages_before_window
        if before and not (last.known and last.depth >= before):
            return  # some of the pages in between are gone
        full = num_written // self.pages.page_size
        pages.last_node = self.pages.prefixes.enter(last, tokens, pages.ids, full)
        if pages.pending:
            self._attach_snapshots(pages, full)

    def release_before_window(self, pages: SequencePages, position: int, last_step: int) -> None:
        """Release the pages before the window of the token at `position`, which is the next token to compute.

        Steps in flight may still read these pages: they return to the pool when `last_step` has completed.
        """
        count = self.pages.prefixes.pages_before_window(position)
        if count > pages.pages_before_window:
            dropped = pages.drop_before_window(count, self.pages.groups, self.pages.full_attention_groups)
            self._retired.append(_Retired(last_step, 0, dropped))
            self._release_retired()

    # -- a sequence ends ----------------------------------------------------------------------------------------------

    def retire(self, pages: SequencePages, last_step: int) -> None:
        """Take row and pages from a sequence; they return to their pools when `last_step` has completed."""
        row = pages.row
        if self.snapshots is not None:
            self.snapshots.give_back([snapshot.place for snapshot in pages.pending])
            pages.borders, pages.pending = [], []
        self._retired.append(_Retired(last_step, row, pages.clear()))
        self._release_retired()

    def complete(self, step: int) -> None:
        """Note that a step, and all steps before it, have completed."""
        self._completed = step
        if self._retired:
            self._release_retired()

    @property
    def num_coming_back(self) -> int:
        """Number of pages that become available when the steps in flight have completed."""
        return self.pages.num_coming_back(page for retired in self._retired for page in retired.pages)

    def _release_retired(self) -> None:
        keep: list[_Retired] = []
        for retired in self._retired:
            if retired.last_step <= self._completed:
                # A sequence that continues keeps its place in the tree, and marks it as used when it ends.
                self.pages.release(retired.pages, touch=retired.row > 0 or not self.pages.full_attention_groups)
                if retired.row:
                    self.rows.release([retired.row])
            else:
                keep.append(retired)
        self._retired = keep

    # -- pages with wrong contents ------------------------------------------------------------------------------------

    def forget(self, pages: SequencePages, others: Iterable[SequencePages]) -> None:
        """Prevent sequences that start from now on from finding pages that this sequence computed or began with.

        It is unknown which page is wrong. So the whole chain is dropped, and everything that continues it.

        Args:
            pages: Pages of the sequence.
            others: All sequences that hold a row. Those that lose their place in the tree no longer share pages,
                because they would enter the same pages again.
        """
        if pages.last_node is not None:
            self.pages.forget(pages.last_node)
        pages.shareable = False
        for other in others:
            if other.last_node is not None and not other.last_node.known:
                other.shareable = False

    def check_invariants(self, sequences: Iterable[tuple[SequencePages, int]]) -> None:
        """Check that no page and no row is lost or held twice.

        Args:
            sequences: The pages of each sequence that holds a row, and the position of its next token.

        Raises:
            AssertionError: The bookkeeping is broken.
        """
        running = list(sequences)
        held_pages = [page for pages, _ in running for page in pages.ids if page]
        held_pages += [page for retired in self._retired for page in retired.pages]
        held_rows = [pages.row for pages, _ in running]
        held_rows += [retired.row for retired in self._retired if retired.row]
        self.pages.check_invariants(held_pages)
        if self.snapshots is not None:
            self.snapshots.check_invariants(snapshot.place for pages, _ in running for snapshot in pages.pending)
        assert len(held_rows) == len(set(held_rows)) == self.rows.in_use, "rows in != rows out"
        assert 0 not in held_rows, "the padding row was handed out"
        for pages, position in running:
            to_write = pages.ids[self.pages.groups * (position // self.pages.page_size) :]
            assert 0 not in to_write, "a page that will be written was given back"
            assert self.pages.are_own(to_write), "a page that is shared, or can be, will be written"
            assert position <= self.pages.room_in(len(pages.ids)), "a token without a page"
