"""Refuse calls in which an engine's thread would wait for tokens that only it can produce.

A caller's done-callbacks run in engine threads. If such code waits for the same engine, directly or through another
engine that waits for it, the wait would never end, and every other request of the engine would wait with it. It gets
an error instead. Logits processors run in other threads and may use the same engine. They get an error only if the
engine would have to end first, because the engine waits for their own request before it ends.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from hf_async_batching.errors import ReentrantCallError
from hf_async_batching.runtime.forking import ForkSafeLock

_serving: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
# The threads for which each serving thread waits at the moment, if it waits.
_waits: dict[threading.Thread, tuple[threading.Thread, ...]] = {}
_lock = ForkSafeLock()


def serve_in_this_thread() -> None:
    """Register the calling thread as one that serves requests."""
    _serving.add(threading.current_thread())


_choosing = threading.local()


@contextmanager
def choosing_for(threads: tuple[threading.Thread, ...]) -> Iterator[None]:
    """Register that the calling thread chooses tokens of a request that the engines of these threads wait for."""
    before = getattr(_choosing, "threads", ())
    _choosing.threads = (*before, *threads)
    try:
        yield
    finally:
        _choosing.threads = before


def chooses_for(thread: threading.Thread) -> bool:
    """Whether the calling thread chooses tokens of a request of that thread's engine, and so delays its end."""
    return thread in getattr(_choosing, "threads", ())


@contextmanager
def waiting_for(threads: tuple[threading.Thread, ...], what: str) -> Iterator[None]:
    """Register that the calling thread waits for all of `threads`.

    Raises:
        ReentrantCallError: One of the threads is the calling thread, or waits for it.
    """
    own = threading.current_thread()
    if own in threads:
        raise ReentrantCallError(_message(what))
    if own not in _serving:
        yield
        return
    with _lock:
        seen: set[threading.Thread] = set()
        ahead = list(threads)
        while ahead:
            thread = ahead.pop()
            if thread is own:
                raise ReentrantCallError(_message(what))
            if thread not in seen:
                seen.add(thread)
                ahead += _waits.get(thread, ())
        before = _waits.get(own)
        _waits[own] = threads
    try:
        yield
    finally:
        with _lock:
            if before is None:
                del _waits[own]
            else:
                _waits[own] = before


def _message(what: str) -> str:
    return (
        f"{what} was called in the engine's own thread (by a done-callback, say), which it would "
        "have to wait for, and so for ever: call it in another thread, or call plain `model.generate` there"
    )
