"""Many chats at once, on a real engine with a tiny model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.demo import wait_until_idle
from support.pace import slowed

from demo.chat.messages import Message
from demo.serving.serving import Serving
from demo.serving.settings import Settings, ends_of
from demo.serving.text import build_prompt
from demo.wall.frames import Frames
from demo.wall.wall import DONE, FAILED, FOLLOW_UPS, MOST_CHATS, STOPPED, WAITING, Wall
from hf_async_batching.errors import QueueFullError

GREEDY = Settings(max_new_tokens=12, greedy=True)
PROMPTS = ["Hi", "Tell me more about the sea, please.", "Name three fruits."]


@pytest.fixture
def make_wall(serving: Serving) -> Callable[..., Wall]:
    def make(prompts: Any = PROMPTS, settings: Settings = GREEDY, **named: Any) -> Wall:
        return Wall(serving, prompts, settings, **named)

    return make


def run(wall: Wall, until: Callable[[], bool] | None = None, seconds: float = 60.0) -> list[Any]:
    """Tick until the wall is over, or until something is so; returns all changes."""
    deadline, changes = time.monotonic() + seconds, []
    while not (until() if until else wall.over):
        assert time.monotonic() < deadline, [tile.state for tile in wall.tiles]
        changes += wall.tick()
        time.sleep(0.005)
    return changes


def alone(serving: Serving, messages: list[Message], settings: Settings) -> str:
    """The answer of a chat that is by itself."""
    tokenizer = serving.chat_model.tokenizer
    request = settings.request(build_prompt(tokenizer, messages), ends_of(serving.chat_model))
    result = serving.manager.submit_request(request).result(60)
    return str(tokenizer.decode(result.token_ids, skip_special_tokens=True)).rstrip("\ufffd")


def test_every_chat_says_what_it_would_say_alone(serving: Serving, make_wall: Any) -> None:
    wall = make_wall(chats=20, turns=2)
    changes = run(wall)
    assert [tile.state for tile in wall.tiles] == [DONE] * 20
    wait_until_idle(serving)
    for tile in wall.tiles[:3]:
        question = PROMPTS[tile.index]
        first, second = (answer for _, answer in tile.segments)
        assert [asked for asked, _ in tile.segments] == [question, FOLLOW_UPS[0]]
        messages = [Message(role="user", content=question)]
        assert first.rstrip("\ufffd") == alone(serving, messages, GREEDY)
        messages += [Message(role="assistant", content=first), Message(role="user", content=FOLLOW_UPS[0])]
        assert second.rstrip("\ufffd") == alone(serving, messages, GREEDY)
        told = "".join(change.get("t", "") for change in changes if change["i"] == tile.index)
        assert told == first + second
    assert wall.tokens == sum(len(turn) for tile in wall.tiles for turn in tile.token_ids) == 20 * 2 * 12
    assert all(tile.first and tile.speed for tile in wall.tiles)
    assert {tile.segments[0][1] for tile in wall.tiles} == {tile.segments[0][1] for tile in wall.tiles[:3]}


def test_chats_join_while_others_run_and_leave_when_told(serving: Serving, make_wall: Any) -> None:
    wall = make_wall(settings=Settings(max_new_tokens=400, greedy=True), chats=2)
    with slowed(serving.manager):
        run(wall, until=lambda: wall.tokens > 10)
        assert wall.add(3) == 3
        assert wall.add(1000) == MOST_CHATS - 5
        run(wall, until=lambda: wall.tiles[4].tokens > 5)
        wall.stop(0)
        run(wall, until=lambda: wall.tiles[0].state == STOPPED)
        assert wall.tiles[4].state not in (STOPPED, DONE)
        wall.stop()
        run(wall)
    assert all(tile.state == STOPPED for tile in wall.tiles)
    assert wall.tiles[0].tokens < 400
    wait_until_idle(serving)


def test_places_in_the_queue_are_told(serving: Serving, make_wall: Any) -> None:
    wall = make_wall(settings=Settings(max_new_tokens=60, greedy=True), chats=40)  # there are 16 rows
    changes = run(wall)
    assert max(change.get("p", 0) for change in changes) > 10
    assert all(tile.place == 0 for tile in wall.tiles)
    assert any(change.get("s") == WAITING for change in changes)
    wait_until_idle(serving)


def test_starts_are_spread_out(make_wall: Any) -> None:
    now = [50.0]
    wall = make_wall(chats=3, stagger=0.2, clock=lambda: now[0])
    for seconds, asked in ((0.0, 1), (0.19, 1), (0.21, 2), (0.39, 2), (0.41, 3)):
        now[0] = 50.0 + seconds
        wall.tick()
        assert sum(tile.handle is not None for tile in wall.tiles) == asked
    run(wall)


def test_a_prompt_that_is_too_long_fails_in_its_own_tile(serving: Serving, make_wall: Any) -> None:
    wall = make_wall(["fine", "x" * 19_000], settings=Settings(max_new_tokens=12, greedy=True), chats=4)
    run(wall)
    assert [tile.state for tile in wall.tiles] == [DONE, FAILED, DONE, FAILED]
    assert "too long" in wall.tiles[1].note
    assert "traceback" not in wall.tiles[1].note.lower()
    wait_until_idle(serving)


def test_a_full_queue_is_told_in_the_tiles(make_manager: Any, make_backend: Any) -> None:
    manager = make_manager()
    manager.refuse = QueueFullError("512 wait")
    wall = Wall(make_backend(manager).require(), PROMPTS, GREEDY, chats=2)
    run(wall)
    assert {tile.state for tile in wall.tiles} == {FAILED}
    assert "queue is full" in wall.tiles[0].note


def test_a_wall_without_prompts_is_refused(make_wall: Any) -> None:
    with pytest.raises(ValueError, match="no prompt"):
        make_wall([], chats=2)


class Page:
    """Applies frames as the page does."""

    def __init__(self) -> None:
        self.seen, self.texts, self.states, self.missing = 0, {}, {}, False  # type: ignore[var-annotated]

    def apply(self, text: str) -> None:
        frame = json.loads(text)
        for number, changes in frame["d"]:
            if number > self.seen + 1:
                self.missing = True
                return
            if number == self.seen + 1:
                self.seen = number
                for change in changes:
                    if "t" in change:
                        self.texts[change["i"]][-1][1] += change["t"]
                    if "q" in change:
                        self.texts.setdefault(change["i"], []).append([change["q"], ""])
                    self.states[change["i"]] = change.get("s", self.states.get(change["i"]))

    def replace(self, whole: dict[str, Any]) -> None:
        self.seen = whole["n"]
        self.texts = {tile["i"]: tile["turns"] for tile in whole["tiles"]}
        self.states = {tile["i"]: tile["s"] for tile in whole["tiles"]}
        self.missing = False


@pytest.mark.parametrize(("seen", "resyncs"), [(1, False), (3, False), (9, True)])
def test_a_page_that_misses_frames_ends_up_with_all_text(make_wall: Any, seen: int, resyncs: bool) -> None:
    wall = make_wall(settings=Settings(max_new_tokens=60), chats=6, turns=2)
    frames, page, missed, number = Frames(wall), Page(), False, 0
    deadline = time.monotonic() + 60
    while True:
        text, number = frames.next(), number + 1
        if number % seen == 0 or wall.over:
            page.apply(text)
            if page.missing:
                missed = True
                page.replace(frames.whole())
        if wall.over:
            break
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert missed == resyncs
    assert page.texts == {tile.index: tile.segments for tile in wall.tiles}
    assert set(page.states.values()) == {DONE}
    summary = json.loads(text)["sum"]
    assert (summary["chats"], summary["done"], summary["over"]) == (6, 6, 6)
    assert summary["tokens"] == wall.tokens
