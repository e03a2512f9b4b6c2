"""Sync and async on a real engine with a tiny model, and visitors who wait for each other."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.demo import wait_until_idle

from demo.compare.comparison import Comparison
from demo.compare.handlers import CompareRuns
from demo.serving.backend import Backend
from demo.serving.errors import LineFullError
from demo.serving.line import Line
from demo.serving.serving import Serving
from demo.serving.settings import Settings
from demo.wall.handlers import WallRuns
from demo.wall.prompts import read_prompts

PROMPTS = ["Hi", "Tell me about the sea."]


def test_both_runs_are_real_and_have_the_same_tokens(serving: Serving) -> None:
    comparison = Comparison(Backend(serving), PROMPTS, chats=6, max_new_tokens=30)
    first_step = serving.manager.stats().steps

    async def run() -> list[Any]:
        depths = []
        async for step in comparison.run():
            depths.append((step.way, serving.manager.stats().depth))
        return depths

    depths = asyncio.run(run())
    assert (1, 1) in depths
    assert (2, 2) in depths
    assert serving.manager.stats().depth == serving.depth, "the usual depth is back"
    assert comparison.same == 6
    sync, asynchronous = comparison.outcomes[1], comparison.outcomes[2]
    assert sync.tokens == asynchronous.tokens == 6 * 30
    assert sync.others == asynchronous.others == 0
    for outcome in (sync, asynchronous):
        assert outcome.tokens_per_second == pytest.approx(outcome.tokens / outcome.seconds)
        assert 0 < outcome.busy_percent <= 100
        assert outcome.mbu_percent > 0
        assert outcome.steps >= 30
        assert outcome.ms_per_step * outcome.steps / 1e3 <= outcome.seconds * 1.05
        assert len(outcome.drawn["steps"]) == 10
    assert sync.drawn["steps"][0][0] >= first_step
    assert serving.manager.stats().steps - first_step >= sync.steps + asynchronous.steps


def test_prompts_of_the_first_run_are_not_found_by_the_second(serving: Serving) -> None:
    prompts = ["word " * 200]
    comparison = Comparison(Backend(serving), prompts, chats=1, max_new_tokens=4)
    before = serving.manager.stats().prefix_hit_tokens

    async def run() -> None:
        async for _ in comparison.run():
            pass

    asyncio.run(run())
    assert serving.manager.stats().prefix_hit_tokens == before


def test_a_visitor_who_leaves_gives_depth_and_rows_back(serving: Serving) -> None:
    comparison = Comparison(Backend(serving), PROMPTS, chats=6, max_new_tokens=900)

    async def run() -> None:
        steps = comparison.run([2])
        async for step in steps:
            if step.done > 0.01:
                break
        assert serving.manager.stats().depth == 2
        await steps.aclose()

    asyncio.run(run())
    assert serving.manager.stats().depth == serving.depth
    wait_until_idle(serving)


def test_one_compares_at_a_time_and_others_see_their_place(serving: Serving) -> None:
    runs = CompareRuns(Backend(serving), Line(1, 1))

    async def compare(visitor: str) -> list[Any]:
        return [state async for state in runs.states(visitor, PROMPTS, chats=2, max_new_tokens=60, ways=[1])]

    async def run() -> list[Any]:
        first = asyncio.create_task(compare("first"))
        await asyncio.sleep(0)
        second = asyncio.create_task(compare("second"))
        await asyncio.sleep(0)
        with pytest.raises(LineFullError):
            await compare("third")
        return await asyncio.gather(first, second)

    first, second = asyncio.run(run())
    assert "place" not in first[0]
    assert second[0] == {"place": 1}
    assert first[-1]["over"]
    assert second[-1]["outcomes"]["1"]["tokens"] == 120


def test_walls_wait_in_line_and_a_wall_that_waits_can_be_stopped(serving: Serving) -> None:
    walls = WallRuns(Backend(serving), Line(1, 4))
    long = Settings(max_new_tokens=900, greedy=True)

    async def run() -> None:
        first = walls.frames("first", PROMPTS, long, chats=3)
        await anext(first)
        second = walls.frames("second", PROMPTS, long, chats=3)
        assert '"place":1' in await anext(second)
        walls.stop("second")
        assert [frame async for frame in second] == []
        third = walls.frames("third", PROMPTS, long, chats=3)
        assert '"place":1' in await anext(third)
        await first.aclose()  # type: ignore[attr-defined]
        while '"place"' in await anext(third):
            pass
        assert walls.add("third", 2) == 2
        assert walls.add("first", 2) == 0
        walls.leave("third")
        async for frame in third:
            last = frame
        assert '"over":true' in last
        assert '"chats":5' in last

    asyncio.run(run())
    wait_until_idle(serving)


def test_prompts_are_lines() -> None:
    assert read_prompts(" one \n\n two\n") == ["one", "two"]
    assert read_prompts(["one", " "]) == ["one"]
    assert len(read_prompts("x\n" * 1000)) == 256
    assert len(read_prompts("x" * 100_000)[0]) == 20_000
