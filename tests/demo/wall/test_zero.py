"""ZeroGPU, with a stand-in for its package."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from demo.chat.messages import Message
from demo.chat.service import ChatService
from demo.serving.backend import Backend
from demo.serving.line import Line
from demo.serving.serving import Serving
from demo.serving.settings import Settings
from demo.wall.handlers import WallRuns
from demo.wall.zero_gpu import ZeroGpu, gpu_decorator

LENT: list[str] = []


def lend(duration: int) -> Callable[..., Any]:
    """As `spaces.GPU`: a GPU is there while the decorated generator runs."""

    def decorate(function: Callable[..., Iterator[str]]) -> Callable[..., Iterator[str]]:
        def lent(*arguments: Any) -> Iterator[str]:
            LENT.append("taken")
            try:
                yield from function(*arguments)
            finally:
                LENT.append("given back")

        return lent

    assert duration > 0
    return decorate


def test_only_a_zerogpu_space_has_the_decorator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=lend))
    assert gpu_decorator() is None
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    assert gpu_decorator() is lend
    monkeypatch.setitem(sys.modules, "spaces", None)
    assert gpu_decorator() is None


def test_a_gpu_is_lent_for_a_whole_wall(serving: Serving) -> None:
    LENT.clear()
    walls = WallRuns(Backend(zero=ZeroGpu(serving.chat_model, lend)), Line(1, 1))

    async def run() -> list[Any]:
        settings = Settings(max_new_tokens=8, greedy=True)
        return [json.loads(frame) async for frame in walls.frames("visitor", ["Hi"], settings, chats=3, turns=2)]

    frames = asyncio.run(run())
    assert frames[-1]["over"]
    assert frames[-1]["sum"]["done"] == 3
    assert LENT == ["taken", "given back"]


def test_a_stopped_wall_gives_its_gpu_back(serving: Serving) -> None:
    LENT.clear()
    walls = WallRuns(Backend(zero=ZeroGpu(serving.chat_model, lend)), Line(1, 1))

    async def run() -> None:
        async for _ in walls.frames("visitor", ["Hi"], Settings(max_new_tokens=900, greedy=True), chats=3):
            walls.stop("visitor")

    asyncio.run(run())
    assert LENT == ["taken", "given back"]


def test_a_chat_says_what_it_needs(serving: Serving) -> None:
    service = ChatService(Backend(zero=ZeroGpu(serving.chat_model, lend)))

    async def run() -> list[Any]:
        asked = [Message(role="user", content="Hi")]
        return [reply async for reply in service.reply("visitor", asked, Settings())]

    (reply,) = asyncio.run(run())
    assert reply.failed
    assert "a Space with its own GPU" in reply.text
