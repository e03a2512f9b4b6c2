"""Threads of one kind of work."""

from __future__ import annotations

import asyncio
import threading

import pytest

from demo.serving.pools import BusyError, Pool


def test_what_waits_is_bounded_and_a_thread_counts_until_it_returns() -> None:
    pool, go_on = Pool("tests", 1, 1), threading.Event()

    async def run() -> None:
        calls = [asyncio.create_task(pool.run(go_on.wait, 20)) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(BusyError, match="busy with other visitors' tests"):
            await pool.run(int)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        next_one = asyncio.create_task(pool.run(int, "7"))
        await asyncio.sleep(0.05)
        with pytest.raises(BusyError):  # the thread of a call that was given up is still taken
            await pool.run(int)
        go_on.set()
        assert await next_one == 7

    asyncio.run(asyncio.wait_for(run(), 20))


def test_an_owner_takes_its_share_of_the_threads() -> None:
    pool, go_on, running = Pool("shares", 2, 8, per_owner=1), threading.Event(), []

    def work(owner: str) -> None:
        running.append(owner)
        go_on.wait(20)

    async def run() -> None:
        calls = [asyncio.create_task(pool.run_for("a", work, "a")) for _ in range(4)]
        await asyncio.sleep(0.05)
        calls.append(asyncio.create_task(pool.run_for("b", work, "b")))
        await asyncio.sleep(0.05)
        assert sorted(running) == ["a", "b"]
        go_on.set()
        await asyncio.gather(*calls)

    asyncio.run(asyncio.wait_for(run(), 20))
    assert sorted(running) == ["a"] * 4 + ["b"]
    assert not pool._turns
