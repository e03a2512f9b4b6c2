"""What the engine's thread does to a handle: append, and wake whoever waits, without waiting for anybody itself."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from hf_async_batching.handle import GenerationHandle, wake


def make(name: str = "a", **changes: Any) -> GenerationHandle:
    return GenerationHandle(name, lambda handle: None, **changes)


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


def test_a_token_wakes_nobody_where_nobody_waits() -> None:
    handle = make()
    waiting = threading.Thread(target=handle.result, daemon=True)
    waiting.start()
    assert not handle._push(5, None, 1.0), "a caller blocked in result() waits for the end only"
    assert handle.token_ids == [5]
    handle._finish("length")
    waiting.join(20)
    assert not waiting.is_alive()


def test_metrics_come_from_the_times_of_arrival() -> None:
    handle = make(logprobs=True)
    for i in range(5):
        handle._push(i, -0.5, handle._submitted + 2 + 0.25 * i)
    handle._finish("length")
    result = handle.result(0)
    assert result.logprobs == [-0.5] * 5
    assert result.metrics.time_to_first_token == pytest.approx(2)
    assert result.metrics.tokens_per_second == pytest.approx(4)


def test_one_token_has_no_rate() -> None:
    handle = make()
    handle._push(5, None, handle._submitted + 2)
    handle._finish("length")
    assert handle.result(0).metrics.tokens_per_second is None


def test_a_waiting_iterator_is_woken_for_each_token_and_the_end() -> None:
    handle, got = make(), []

    def consume() -> None:
        got.extend(handle)

    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    for i in range(3):
        wait_until(lambda: handle._watchers == 1)
        assert handle._push(i, None, 0.0)
        wake([handle])
        wait_until(lambda i=i: len(handle.token_ids) == i + 1)
    wait_until(lambda: handle._watchers == 1)
    handle._finish("length")
    thread.join(20)
    assert got == [0, 1, 2]


class Loop:
    """Counts what is scheduled, and runs it when told."""

    def __init__(self, closed: bool = False) -> None:
        self.closed, self.scheduled = closed, []  # type: ignore[var-annotated]

    def call_soon_threadsafe(self, function: Any, *args: Any) -> None:
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.scheduled.append((function, args))


def test_an_event_loop_is_called_once_for_all_its_handles() -> None:
    first, second, closed = Loop(), Loop(), Loop(closed=True)
    handles = [make(str(i)) for i in range(5)]
    events = [asyncio.Event() for _ in handles]
    for handle, loop, event in zip(handles, (first, closed, first, second, first), events, strict=True):
        handle._async_watchers.append((loop, event))  # type: ignore[arg-type]
        assert handle._push(1, None, 0.0)
    wake(handles)
    assert (len(first.scheduled), len(second.scheduled)) == (1, 1)
    for function, args in first.scheduled + second.scheduled:
        function(*args)
    assert [event.is_set() for event in events] == [True, False, True, True, True], "a closed loop has nobody left"


def test_the_end_wakes_an_event_loop() -> None:
    handle, loop, event = make(), Loop(), asyncio.Event()
    handle._async_watchers.append((loop, event))  # type: ignore[arg-type]
    handle._fail(ValueError("broken"))
    assert len(loop.scheduled) == 1
    with pytest.raises(ValueError, match="broken"):
        handle.result(0)


def test_done_callbacks() -> None:
    handle, seen = GenerationHandle("a", lambda handle: None), []
    handle.add_done_callback(seen.append)
    assert seen == []
    handle._finish("length")
    assert seen == [handle]
    handle.add_done_callback(seen.append)
    assert seen == [handle, handle]
    failed = GenerationHandle("b", lambda handle: None)
    failed.add_done_callback(seen.append)
    failed._fail(ValueError("no"))
    assert seen[2] is failed


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_callback_that_raises_stops_no_other(error: type[BaseException], caplog: Any) -> None:
    handle, seen = make(), []

    def raises(handle: GenerationHandle) -> None:
        raise error("mine")

    waiting = threading.Thread(target=lambda: seen.append(list(handle)), daemon=True)
    waiting.start()
    wait_until(lambda: handle._watchers == 1)
    for callback in (raises, seen.append, raises):
        handle.add_done_callback(callback)
    with caplog.at_level(logging.ERROR):
        handle._finish("length")
    waiting.join(20)
    assert seen == [handle, []], "the other callback was called, and the reader woken"
    assert len(caplog.records) == 2
    assert "mine" in caplog.text


def test_a_callback_that_comes_late_and_raises_is_logged_too(caplog: Any) -> None:
    handle = make()
    handle._finish("length")
    with caplog.at_level(logging.ERROR):
        handle.add_done_callback(lambda handle: 1 / 0)
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(KeyboardInterrupt):  # of the thread that adds it
        handle.add_done_callback(lambda handle: signal.raise_signal(signal.SIGINT))


def test_an_event_loop_of_a_caller_that_raises_stops_no_other(caplog: Any) -> None:
    class Odd(Loop):
        def call_soon_threadsafe(self, function: Any, *args: Any) -> None:
            raise SystemExit("mine")

    handle, odd, loop = make(), Odd(), Loop()
    for one in (odd, loop):
        handle._async_watchers.append((one, asyncio.Event()))  # type: ignore[arg-type]
    wake([handle])
    assert len(loop.scheduled) == 1
    assert "mine" in caplog.text


def test_await_gives_what_result_gives() -> None:
    handle = make(logprobs=True)

    async def main() -> Any:
        waiting = asyncio.ensure_future(anext(handle.__aiter__()))
        both = asyncio.gather(in_task(handle), in_task(handle))
        await asyncio.sleep(0.01)
        assert len(handle._end_watchers) == 2, "not woken for each token"
        assert handle._push(5, -0.5, handle._submitted), "the iterator is"
        assert len(handle._async_watchers) == 1
        wake([handle])
        assert await waiting == 5
        assert not both.done()
        assert not handle._push(6, -0.25, handle._submitted + 1), "an await waits for the end only"
        threading.Thread(target=handle._finish, args=("length",)).start()
        return await both

    first, second = asyncio.run(main())
    assert first == second == handle.result(0)
    assert first.token_ids == [5, 6]
    assert not handle._end_watchers
    assert asyncio.run(in_task(handle)) == first, "an ended handle is there at once"


async def in_task(handle: GenerationHandle) -> Any:
    return await handle


def test_await_raises_what_ends_the_request() -> None:
    handle = make()
    handle._fail(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(in_task(handle))


async def read_tokens(handle: GenerationHandle) -> Any:
    return [token async for token in handle]


async def read_text(handle: GenerationHandle) -> Any:
    return [piece async for piece in handle.text(SimpleNamespace(decode=lambda ids, **_: "x" * len(ids)))]


@pytest.mark.parametrize("read", [in_task, read_tokens, read_text])
@pytest.mark.parametrize("option", [True, False])
def test_a_reader_that_is_cancelled_cancels_its_request_where_that_is_wished(read: Any, option: bool) -> None:
    cancelled: list[GenerationHandle] = []
    handle = GenerationHandle("a", cancelled.append)
    handle.cancel_on_abandon = option

    async def main() -> None:
        reader = asyncio.ensure_future(read(handle))
        await asyncio.sleep(0.01)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader

    asyncio.run(main())
    assert cancelled == ([handle] if option else [])
    assert not handle._end_watchers and not handle._async_watchers


def test_repr_says_the_state() -> None:
    handle = make()
    assert repr(handle) == "GenerationHandle('a', waiting, 0 tokens)"
    handle._start(0)
    handle._push(5, None, 0.0)
    assert repr(handle) == "GenerationHandle('a', running, 1 token)"
    handle._finish("eos")
    assert repr(handle) == "GenerationHandle('a', eos, 1 token)"
    failed = make()
    failed._fail(ValueError("no"))
    assert repr(failed) == "GenerationHandle('a', failed: ValueError, 0 tokens)"
