"""Iterators over a handle's tokens go on where they stood, however a wait ended."""

from __future__ import annotations

import asyncio
import itertools
import signal
import threading
from typing import Any

import pytest

from hf_async_batching import ReentrantCallError
from hf_async_batching.handle import GenerationHandle, wake


def make() -> GenerationHandle:
    return GenerationHandle("a", lambda handle: None)


def push(handle: GenerationHandle, token: int) -> None:
    if handle._push(token, None, 0.0):
        wake([handle])


def fed(handle: GenerationHandle, count: int, seconds: float = 0.01) -> threading.Thread:
    def feed() -> None:
        for token in range(count):
            threading.Event().wait(seconds)
            push(handle, token)
        handle._finish("length")

    thread = threading.Thread(target=feed)
    thread.start()
    return thread


def test_a_wait_that_times_out_loses_no_token() -> None:
    handle = make()

    async def main() -> tuple[list[int], int]:
        stream, got, timeouts = aiter(handle), [], 0
        for milliseconds in itertools.cycle((1, 3, 7)):
            try:
                got.append(await asyncio.wait_for(anext(stream), milliseconds / 1000))
            except TimeoutError:
                timeouts += 1
            except StopAsyncIteration:
                break
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        return got, timeouts

    thread = fed(handle, 30)
    got, timeouts = asyncio.run(main())
    thread.join()
    assert got == list(range(30))
    assert timeouts > 5
    assert not handle._async_watchers, "nothing is left that would be woken"


def test_a_timeout_at_the_moment_of_a_token() -> None:
    """The token has come and the wait was cancelled before its task ran: it is the next one."""
    handle = make()

    async def main() -> list[int]:
        stream = aiter(handle)
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        push(handle, 5)
        await asyncio.sleep(0)
        task.cancel()
        got = await asyncio.gather(task, return_exceptions=True)
        push(handle, 6)
        handle._finish("length")
        return [one for one in got if isinstance(one, int)] + [token async for token in stream]

    assert asyncio.run(main()) == [5, 6]


def test_a_signal_in_a_wait_loses_no_token() -> None:
    """As Ctrl-C does, and time-outs by SIGALRM."""
    handle, got, alarms = make(), [], 0

    class Alarm(Exception):
        pass

    def alarm(*_: Any) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, alarm)
    try:
        stream, thread = iter(handle), fed(handle, 6, 0.03)
        while True:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.012)
                token = next(stream, None)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Alarm:
                alarms += 1
                continue
            if token is None:
                break
            got.append(token)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    thread.join()
    assert got == list(range(6))
    assert alarms > 2
    assert handle._watchers == 0


@pytest.mark.parametrize("error", [ValueError("broken"), StopIteration("odd"), StopAsyncIteration("odd")])
def test_an_error_is_raised_once_behind_the_tokens(error: Exception) -> None:
    handle = make()
    push(handle, 3)
    handle._fail(error)
    kind = ValueError if isinstance(error, ValueError) else RuntimeError

    async def read() -> list[int]:
        stream = aiter(handle)
        got = [await anext(stream)]
        with pytest.raises(kind, match=r"odd|broken"):
            await anext(stream)
        return got + [token async for token in stream]

    stream = iter(handle)
    assert next(stream) == 3
    with pytest.raises(kind, match=r"odd|broken"):
        next(stream)
    assert list(stream) == []
    assert asyncio.run(read()) == [3]


def test_a_wake_for_a_token_that_was_taken_blocks_no_loop() -> None:
    handle = make()

    async def main() -> None:
        task = asyncio.ensure_future(anext(aiter(handle)))
        await asyncio.sleep(0)
        wake([handle])
        later = threading.Timer(0.3, push, (handle, 5))
        later.start()
        await asyncio.sleep(0.01)
        assert not task.done(), "other tasks ran meanwhile"
        assert await task == 5
        later.join()

    asyncio.run(main())


@pytest.mark.timeout(30)
def test_an_iteration_in_the_thread_that_brings_the_tokens_is_refused() -> None:
    handle = GenerationHandle("a", lambda handle: None, threads=(threading.current_thread(),))
    with pytest.raises(ReentrantCallError, match="iteration over a request's tokens"):
        next(iter(handle))

    async def later() -> None:
        await anext(aiter(handle))

    with pytest.raises(ReentrantCallError, match="iteration over a request's tokens"):
        asyncio.run(later())
    assert not handle._watchers and not handle._async_watchers


def test_closing_an_iteration_leaves_the_request_to_others() -> None:
    handle = make()

    async def main() -> list[int]:
        stream: Any = aiter(handle)
        push(handle, 1)
        assert await anext(stream) == 1
        await stream.aclose()
        push(handle, 2)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        handle._finish("length")
        return [token async for token in handle]

    assert asyncio.run(main()) == [1, 2]


def test_several_iterators_each_see_all() -> None:
    handle, got = make(), []

    async def main() -> None:
        async def read() -> None:
            got.append([token async for token in handle])

        await asyncio.gather(*[read() for _ in range(3)])

    thread = fed(handle, 8, 0.003)
    asyncio.run(main())
    thread.join()
    assert got == [list(range(8))] * 3
