"""The race: plain `generate` and the engine answer the same questions."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from support.demo import wait_until_idle

from demo.compare.comparison import Comparison, limits_of
from demo.compare.handlers import RACE, CompareRuns
from demo.compare.plain import PlainGenerate
from demo.serving.backend import Backend
from demo.serving.line import Line
from demo.serving.serving import Serving

QUESTIONS = ["Hi", "Tell me about the sea.", "Why?"]


def test_all_ways_give_the_same_tokens_of_the_same_lengths(serving: Serving) -> None:
    comparison = Comparison(Backend(serving), QUESTIONS, chats=4, max_new_tokens=24, ragged=True)

    async def run() -> list[Any]:
        return [step async for step in comparison.run(RACE)]

    steps = asyncio.run(run())
    assert list(dict.fromkeys(step.way for step in steps)) == list(RACE)
    assert all(0 <= step.done <= 1 for step in steps)
    assert comparison.same == 4
    outcomes = [comparison.outcomes[way] for way in RACE]
    assert {outcome.tokens for outcome in outcomes} == {sum(limits_of(4, 24))}
    assert all(outcome.seconds > 0 and outcome.others == 0 and not outcome.gpu for outcome in outcomes)
    assert serving.manager.stats().depth == serving.depth


def test_what_others_compute_beside_plain_generate_is_counted(serving: Serving) -> None:
    comparison = Comparison(Backend(serving), QUESTIONS, chats=2, max_new_tokens=24)

    async def run() -> None:
        async for _ in comparison.run(RACE[:1]):
            await asyncio.to_thread(serving.manager.submit([1, 2, 3], max_new_tokens=2).result)

    asyncio.run(run())
    assert comparison.outcomes[RACE[0]].others > 0


def test_a_stopped_run_of_plain_generate_ends_with_its_next_token(serving: Serving) -> None:
    plain = PlainGenerate(serving.chat_model, [[1, 2, 3]] * 2, [2000, 2000])

    async def run() -> float:
        task = asyncio.create_task(asyncio.to_thread(plain.run, 1))
        while plain.tokens < 5:
            await asyncio.sleep(0.01)
        began = time.perf_counter()
        plain.stop()
        await task
        return time.perf_counter() - began

    assert asyncio.run(run()) < 2
    assert plain.tokens < 2000
    assert len(plain.token_ids) == 1, "no question is begun after the stop"


def test_a_visitor_who_leaves_a_race_ends_it(serving: Serving) -> None:
    runs = CompareRuns(Backend(serving), Line(1, 1))

    async def run() -> list[Any]:
        states = []
        async for state in runs.states("me", QUESTIONS, chats=3, max_new_tokens=1000, ways=RACE):
            states.append(state)
            if state.get("done", 0) > 0:
                runs.stop("me")
        return states

    states = asyncio.run(run())
    assert states[-1]["stopped"]
    assert states[-1]["outcomes"] == {}
    wait_until_idle(serving)


def test_an_answer_that_ends_early_is_cut_at_its_end(serving: Serving) -> None:
    plain = PlainGenerate(serving.chat_model, [[1]], [4])
    end = plain._ends[0]
    assert plain._answer([5, 6, end, end]) == [5, 6, end]
    assert plain._answer([5, 6]) == [5, 6]


@pytest.mark.parametrize(("chats", "longest"), [(1, 16), (16, 128)])
def test_answers_of_a_race_differ_in_length(chats: int, longest: int) -> None:
    limits = limits_of(chats, longest)
    assert len(limits) == chats
    assert max(limits) == longest
    assert min(limits) >= 1
    assert chats == 1 or len(set(limits)) > 3
