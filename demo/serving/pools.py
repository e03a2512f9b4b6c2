"""Threads for each kind of work, so that one kind never takes the threads of another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class BusyError(RuntimeError):
    """Too much work waits already; the message is for the visitor."""


class Pool:
    """A few threads, and a bound on the calls that wait for them. `run` is called from an event loop.

    Args:
        name: The kind of work, for thread names and messages.
        threads: How many calls run at once.
        waiting: How many calls may wait beyond them.
        per_owner: How many threads one visitor's calls may take at once; None for all.
    """

    def __init__(self, name: str, threads: int, waiting: int, per_owner: int | None = None) -> None:
        self._name = name
        self._most = threads + waiting
        self._per_owner = per_owner or threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"demo-{name.replace(' ', '-')}")
        self._lock = threading.Lock()
        self._inside = 0
        self._turns: dict[str, tuple[asyncio.Semaphore, list[int]]] = {}

    async def run(
        self,
        function: Callable[_Arguments, _Result],
        /,
        *arguments: _Arguments.args,
        **named: _Arguments.kwargs,
    ) -> _Result:
        """Call a function in one of the threads.

        Raises:
            BusyError: Too many calls wait already.
        """
        return await self.run_for("", function, *arguments, **named)

    async def run_for(
        self,
        owner: str,
        function: Callable[_Arguments, _Result],
        /,
        *arguments: _Arguments.args,
        **named: _Arguments.kwargs,
    ) -> _Result:
        """Call a function in one of the threads for a visitor; see `run`. An empty owner has no limit of its own."""
        async with self._turn(owner):
            with self._lock:
                if self._inside >= self._most:
                    raise BusyError(f"The server is busy with other visitors' {self._name}. Try again in a minute.")
                self._inside += 1
            try:
                future = self._executor.submit(function, *arguments, **named)
            except BaseException:
                self._leave()
                raise
            # A thread whose caller has left still counts until its function returns.
            future.add_done_callback(self._leave)
            return await asyncio.wrap_future(future)

    def _leave(self, _: Future[Any] | None = None) -> None:
        with self._lock:
            self._inside -= 1

    @asynccontextmanager
    async def _turn(self, owner: str) -> AsyncIterator[None]:
        if not owner:
            yield
            return
        turns, users = self._turns.setdefault(owner, (asyncio.Semaphore(self._per_owner), [0]))
        if users[0] >= self._most:
            raise BusyError(f"You have {users[0]} calls waiting for the {self._name}. Please let some of them end.")
        users[0] += 1
        try:
            async with turns:
                yield
        finally:
            users[0] -= 1
            if not users[0]:
                self._turns.pop(owner, None)


PROMPTS = Pool("prompts", 4, 256, per_owner=2)
WALLS = Pool("walls", 6, 32)
TABLES = Pool("tables", 3, 24, per_owner=2)
DATASETS = Pool("datasets", 3, 0)
# One race runs at a time; the thread of a race that was stopped ends with its next token.
RACES = Pool("races", 1, 4)
TRACES = Pool("traces", 1, 16)
