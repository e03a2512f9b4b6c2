"""Decide which sequence starts next, and how many prompt tokens a step computes. No torch, no threads.

With "fcfs" requests start in order of arrival. "longest_first" is for work of which only the end counts:

- Among the waiting requests, the one that may become longest starts first (longest processing time first, Graham
  1969), so that no long request runs alone at the end.
- Once there is a free row for every waiting request, prompts are spread over the steps. A step reads all weights
  anyway, so prompt pieces in decode steps cost about half of what they cost in separate steps
  (`step_sizes.SPREAD_TOKENS`; piggybacking, as in Sarathi-Serve, arXiv 2403.02310). No request is delayed so long that
  it would end after the request that ends last in any case, as far as `max_new_tokens` tells.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain

from hf_async_batching.config import Admission
from hf_async_batching.kv_cache.prefix_node import Node
from hf_async_batching.scheduler.sequence import Sequence, State

# Requests per block and row: no request waits for a request of a later block.
_BLOCK = 4

WORTH_WAITING = 256
"""A request waits a step if it then finds at least this many more tokens in the prefix cache."""

MOST_PASSED = 64
"""Number of requests that may wait for this reason at a time. Later requests wait too, which bounds the look-ups."""


class WaitingQueue:
    """Sequences that wait for a row. Preempted sequences come first, the youngest of them last.

    Args:
        admission: Order of the other sequences.
        max_rows: Total number of rows.
    """

    def __init__(self, admission: Admission, max_rows: int) -> None:
        self._longest_first = admission == "longest_first"
        self._block = _BLOCK * max_rows
        self._preempted: deque[Sequence] = deque()
        self._new: deque[Sequence] = deque()

    def add(self, sequence: Sequence) -> None:
        """Add a new sequence in its place."""
        if self._longest_first:
            bisect.insort(self._new, sequence, key=self._key)
        else:
            self._new.append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Add a preempted sequence at the front: all waiting sequences are younger, or started later."""
        self._preempted.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence from any place."""
        (self._preempted if sequence in self._preempted else self._new).remove(sequence)

    def __len__(self) -> int:
        return len(self._preempted) + len(self._new)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._preempted, self._new)

    def _key(self, sequence: Sequence) -> tuple[int, int, int]:
        return sequence.arrival // self._block, -sequence.request.max_new_tokens, sequence.arrival

    def check_invariants(self) -> None:
        """Check the order of the queue.

        Raises:
            AssertionError: The order is wrong.
        """
        keys = [self._key(s) if self._longest_first else (s.arrival,) for s in self._new]
        assert keys == sorted(keys), "a sequence overtook the queue"


def spread_budget(budget: int, running: Iterable[Sequence], waiting: Iterable[Sequence], *, room: int) -> int:
    """Number of prompt tokens in a step if prompts are spread.

    Args:
        budget: Upper bound.
        running: Sequences with a row.
        waiting: All other sequences, in the order in which they will start; there is a row for each.
        room: Preferred number, next to the decoding rows.

    Returns:
        `room`, or more if a request would otherwise end after the one that ends last; at most `budget`.
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


def found_a_step_later(
    sequence: Sequence, computed: Iterable[Sequence], page_size: int, *, states: bool = False
) -> bool:
    """Whether a sequence would find much more of its prompt in the prefix cache if it started one step later.

    With states it would find nothing before another sequence has computed its prompt up to a snapshot. This may take
    more steps, in which the sequence would compute the same tokens.

    Args:
        sequence: A sequence that is about to start; its prefix has been looked up.
        computed: Sequences of which the planned step computes a piece; that piece counts as computed.
        page_size: Tokens per page of one group of layers; `WORTH_WAITING` is a multiple of it.
        states: Whether rows have states.
    """
    start = sequence.pages.last_node
    assert start is not None
    begun = start.depth * page_size
    reached = begun + WORTH_WAITING
    # The last token must be computed in any case.
    if not sequence.pages.shareable or len(sequence.tokens) <= reached:
        return False
    for other in computed:
        if states:
            found = next((border for border in other.pages.borders if border >= reached), 0)
        else:
            found = reached if other.num_computed >= reached else 0
        if (
            0 < found < len(sequence.tokens)
            and other.pages.shareable
            and other.prefix_tokens[begun:found] == sequence.prefix_tokens[begun:found]
            and _goes_on_behind(other, start)
        ):
            return True
    return False


def _goes_on_behind(sequence: Sequence, node: Node) -> bool:
    """Whether a sequence began with a node's page or entered it."""
    own = sequence.pages.last_node
    while own is not None and own.depth > node.depth:
        own = own.parent
    return own is node
