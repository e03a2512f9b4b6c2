"""Wait for the tokens of a handle, and for its end.

The iterators are objects and not generators: if a wait ends early (`asyncio.wait_for`, Ctrl-C, a signal handler that
raises), the next call continues after the last token that was taken.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Protocol

from hf_async_batching.runtime.reentrancy import waiting_for


class TokenSource(Protocol):
    """The part of a `GenerationHandle` that the iterators read."""

    request_id: str
    _tokens: list[int]
    _error: BaseException | None
    _done: threading.Event
    _threads: tuple[threading.Thread, ...]
    _changed: threading.Condition
    _watchers: int
    _async_watchers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]
    _end_watchers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]
    cancel_on_abandon: bool

    def cancel(self) -> None:
        """End the request."""

    def _check_process(self) -> None: ...


class _TokenStream:
    def __init__(self, handle: TokenSource) -> None:
        self._handle = handle
        self._position = 0
        self._over = False

    def _waits(self) -> bool:
        """Whether the next call would have to wait."""
        # In this order: once the end is set, all tokens have arrived.
        ended = self._handle._done.is_set()
        return not ended and self._position == len(self._handle._tokens)

    def _take(self) -> int | None:
        """The next token; None at the end. If an error ended the request, it is raised once."""
        tokens = self._handle._tokens
        if self._over:
            return None
        if self._position < len(tokens):
            token = tokens[self._position]
            self._position += 1
            return token
        self._over = True
        error = self._handle._error
        if isinstance(error, (StopIteration, StopAsyncIteration)):
            raise RuntimeError(f"request {self._handle.request_id} ended with {error!r}") from error
        if error is not None:
            raise error
        return None


class TokenIterator(_TokenStream):
    """New tokens from the first on, each as soon as it arrives; raises the error that ends the request."""

    def __iter__(self) -> TokenIterator:
        return self

    def __next__(self) -> int:
        if not self._over and self._waits():
            self._wait()
        token = self._take()
        if token is None:
            raise StopIteration
        return token

    def _wait(self) -> None:
        handle = self._handle
        handle._check_process()
        with waiting_for(handle._threads, "iteration over a request's tokens"), handle._changed:
            # Register before checking: a token that is appended after the check finds a watcher to wake.
            handle._watchers += 1
            try:
                while self._waits():
                    handle._changed.wait()
            finally:
                handle._watchers -= 1


class AsyncTokenIterator(_TokenStream):
    """Like `TokenIterator`, without blocking the event loop."""

    def __aiter__(self) -> AsyncTokenIterator:
        return self

    async def __anext__(self) -> int:
        if not self._over and self._waits():
            await self._wait()
        token = self._take()
        if token is None:
            raise StopAsyncIteration
        return token

    async def aclose(self) -> None:
        """End the iteration; the request continues."""
        self._over = True

    async def _wait(self) -> None:
        await _wait_in_loop(
            self._handle, self._handle._async_watchers, self._waits, "iteration over a request's tokens"
        )


async def wait_for_end(handle: TokenSource) -> None:
    """Wait until a request has ended, without blocking the event loop or waking for each token."""
    if not handle._done.is_set():
        await _wait_in_loop(handle, handle._end_watchers, lambda: not handle._done.is_set(), "await of a handle")


async def _wait_in_loop(
    handle: TokenSource,
    watchers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]],
    waits: Callable[[], bool],
    what: str,
) -> None:
    handle._check_process()
    with waiting_for(handle._threads, what):
        pass  # the loop's thread runs other tasks in the meantime
    event = asyncio.Event()
    watcher = (asyncio.get_running_loop(), event)
    # Register before checking: anything that comes after the check finds a watcher to wake.
    watchers.append(watcher)
    try:
        while waits():
            await event.wait()
            event.clear()
    except asyncio.CancelledError:
        if handle.cancel_on_abandon:
            handle.cancel()
        raise
    finally:
        watchers.remove(watcher)
