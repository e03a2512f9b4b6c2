"""The order in which rows go to the engine; callers do not see it."""

from __future__ import annotations

import heapq
import math
from array import array
from collections import deque
from typing import Any, NamedTuple

from hf_async_batching.core.request import Request
from hf_async_batching.dataset.rows.row import PreparedRow

# Two buckets for each doubling of the length: fine enough for the end of a run, and coarse enough to group prefixes.
_BUCKETS_PER_OCTAVE = 2
_PREFIX_TOKENS = 64


class RowJob(NamedTuple):
    """One completion of a row, as it goes to the engine.

    Attributes:
        row: The row.
        completion: Index of the completion in its row.
        request: The request.
        arguments: Arguments of `GenerationManager.submit`, which handles criteria that are not part of a request; None
            if the request says everything.
    """

    row: PreparedRow
    completion: int
    request: Request
    arguments: dict[str, Any] | None = None


class RowOrdering:
    """The rows that wait for the engine, longest first.

    Long requests that start last would leave the engine half empty at the end of a run, so they start first (the rule
    of longest processing time, Graham 1969). Rows of similar length are sorted by their first tokens. Rows with the
    same beginning then follow each other and find it in the prefix cache. A further completion of a row waits until
    the engine has got a step's worth of other prompts. By then it finds the pages of the first completion.

    Args:
        block: Rows of an earlier block of this size go before rows of a later block, so that no row waits forever.
        step_tokens: Prompt tokens that the engine computes in one step.
    """

    def __init__(self, *, block: int, step_tokens: int) -> None:
        self._block = block
        self.step_tokens = step_tokens
        self._waiting: list[tuple[int, int, bytes, int, list[RowJob]]] = []
        self._followers: deque[tuple[int, RowJob]] = deque()
        self._again: deque[RowJob] = deque()
        self._given = 0

    def add(self, jobs: list[RowJob]) -> None:
        """Add all completions of one row."""
        row, request = jobs[0].row, jobs[0].request
        bucket = int(math.log2(len(request.prompt) + request.max_new_tokens) * _BUCKETS_PER_OCTAVE)
        prefix = array("i", request.prompt[:_PREFIX_TOKENS]).tobytes()
        heapq.heappush(self._waiting, (row.index // self._block, -bucket, prefix, row.index, jobs))

    def add_again(self, job: RowJob) -> None:
        """Add a completion that the engine lost; it goes first."""
        self._again.append(job)

    def take(self, count: int) -> list[RowJob]:
        """Take the next `count` completions, or fewer if no more are ready."""
        taken: list[RowJob] = []
        while len(taken) < count:
            if self._again:
                taken.append(self._again.popleft())
            elif self._followers and (self._followers[0][0] <= self._given or not self._waiting):
                taken.append(self._followers.popleft()[1])
            elif self._waiting:
                first, *others = heapq.heappop(self._waiting)[-1]
                taken.append(first)
                self._given += len(first.request.prompt)
                self._followers.extend((self._given + self.step_tokens, job) for job in others)
            else:
                break
        return taken

    def __len__(self) -> int:
        """Return the number of waiting completions."""
        return sum(len(entry[-1]) for entry in self._waiting) + len(self._followers) + len(self._again)

    def __bool__(self) -> bool:
        return bool(self._waiting or self._followers or self._again)
