"""Who starts next, and how much of the prompts a step computes. No torch, no threads.

With "fcfs" requests start in the order in which they came. "longest_first" is for work of which only the end counts:

- Of the requests that wait the one that may become longest starts first (the rule of longest processing time, Graham
  1969), so that no long one runs on alone at the end.
- Once rows are free for all that wait, prompts are spread over the steps. A step reads all weights anyway: pieces of
  prompts cost about half in decode steps of what they cost in steps of their own (`step_sizes.SPREAD_TOKENS`;
  piggybacking, as in Sarathi-Serve, arXiv 2403.02310). No request is put off so long that it would end after the one
  that ends last anyway, as far as `max_new_tokens` tells.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain

from hf_async_batching.config import Admission
from hf_async_batching.kv_cache.prefix_cache import Node
from hf_async_batching.scheduler.sequence import Sequence, State

# Requests in a block, by the rows that there are; no request waits for those of a later one.
_BLOCK = 4

WORTH_WAITING = 256
"""Tokens found in the prefix cache for which a request waits a step; fewer are not worth it."""

MOST_PASSED = 64
"""Requests that may wait so at a time: those behind them wait, too, which bounds the work of looking them all up."""


class WaitingQueue:
    """Sequences that wait for a row. The preempted ones are first, the youngest of them last.

    Args:
        admission: The order of the others.
        max_rows: Rows that there are.
    """

    def __init__(self, admission: Admission, max_rows: int) -> None:
        self._longest_first = admission == "longest_first"
        self._block = _BLOCK * max_rows
        self._preempted: deque[Sequence] = deque()
        self._new: deque[Sequence] = deque()

    def add(self, sequence: Sequence) -> None:
        """Put a new one in its place."""
        if self._longest_first:
            bisect.insort(self._new, sequence, key=self._key)
        else:
            self._new.append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """One that was preempted: all of those that wait are younger, or started later."""
        self._preempted.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take one from wherever it stands."""
        (self._preempted if sequence in self._preempted else self._new).remove(sequence)

    def __len__(self) -> int:
        return len(self._preempted) + len(self._new)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._preempted, self._new)

    def _key(self, sequence: Sequence) -> tuple[int, int, int]:
        return sequence.arrival // self._block, -sequence.request.max_new_tokens, sequence.arrival

    def check_invariants(self) -> None:
        """The order of the queue.

        Raises:
            AssertionError: It is broken.
        """
        keys = [self._key(s) if self._longest_first else (s.arrival,) for s in self._new]
        assert keys == sorted(keys), "a sequence overtook the queue"


def spread_budget(budget: int, running: Iterable[Sequence], waiting: Iterable[Sequence], *, room: int) -> int:
    """Prompt tokens of a step where prompts are spread.

    Args:
        budget: How many there can be.
        running: Sequences with a row.
        waiting: All others, which can have one; in the order in which they will start.
        room: How many there should be, next to what decodes.

    Returns:
        `room`, or more where a request would else end behind the one that ends last; never above `budget`.
    """
    prompts = [sequence for sequence in running if sequence.state is State.PREFILLING]
    prompts += waiting
    if not prompts:
        return budget
    last = max(sequence.max_length - sequence.num_planned for sequence in chain(running, prompts))
    tokens, rate = 0, room
    for sequence in prompts:
        tokens += len(sequence.tokens) - sequence.num_computed
        steps = last - (sequence.max_length - sequence.num_planned) + 1
        if tokens > rate * steps:
            rate = -(-tokens // steps)
            if rate >= budget:
                return budget
    return min(rate, budget)


def found_a_step_later(sequence: Sequence, computed: Iterable[Sequence], page_size: int) -> bool:
    """Whether a sequence would find much more of its prompt in the prefix cache if it started one step later.

    Args:
        sequence: About to start, looked up already.
        computed: Sequences of which the step that is being planned computes a piece, which counts as computed.
        page_size: Tokens per page of one group of layers; `WORTH_WAITING` is a multiple of it.
    """
    start = sequence.pages.last_node
    assert start is not None
    begun = start.depth * page_size
    reached = begun + WORTH_WAITING
    # The last token must be computed whatever is known.
    if not sequence.pages.shareable or len(sequence.tokens) <= reached:
        return False
    for other in computed:
        if (
            other.num_computed >= reached
            and other.pages.shareable
            and other.tokens[begun:reached] == sequence.tokens[begun:reached]
            and _goes_on_behind(other, start)
        ):
            return True
    return False


def _goes_on_behind(sequence: Sequence, node: Node) -> bool:
    """Whether a node is among the pages that a sequence began with or entered."""
    own = sequence.pages.last_node
    while own is not None and own.depth > node.depth:
        own = own.parent
    return own is node
