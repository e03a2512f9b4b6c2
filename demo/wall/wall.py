"""Runs many conversations at once in one batch, and reports each one's progress as small changes."""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_async_batching.text_stream import TextDecoder

from ..chat.messages import Message
from ..serving.problems import explain
from ..serving.serving import Serving
from ..serving.settings import Settings, ends_of
from ..serving.text import build_prompt

if TYPE_CHECKING:
    from hf_async_batching import GenerationHandle
    from hf_async_batching.core.request import Request

MOST_CHATS = 64
MOST_TURNS = 4
# Seconds between two starts.
MOST_STAGGER = 5.0


class WallDefaults(NamedTuple):
    """The defaults of a wall, for the page's controls and the API."""

    chats: int = 16
    turns: int = 2
    max_new_tokens: int = 120
    stagger: float = 0.15
    greedy: bool = False


WALL = WallDefaults()
# A tile shows the end of its conversation and keeps so many characters of it.
_KEPT_CHARACTERS = 6000

FOLLOW_UPS = ("Say that again in one sentence.", "Give me one example.", "Explain it to a child.")

# The states of a tile; the page draws them by these words.
SOON, WAITING, PREFILL, DECODING = "soon", "waiting", "prefill", "decoding"
DONE, STOPPED, FAILED = "done", "stopped", "failed"
OVER = frozenset((DONE, STOPPED, FAILED))

Change = dict[str, Any]


@dataclass
class Tile:
    """One conversation.

    Attributes:
        index: Place on the wall.
        questions: The user's messages, turn by turn.
        state: One of the states above; empty before the first look.
        segments: The [question, answer] pairs that the page shows.
        tokens: New tokens of all turns.
        first: Seconds from the first question to the first token; None before.
        speed: Tokens per second of the last answer since its first token.
        token_ids: New tokens, turn by turn.
    """

    index: int
    questions: Sequence[str]
    starts_at: float
    state: str = ""
    tokens: int = 0
    first: float | None = None
    speed: float | None = None
    place: int = 0
    note: str = ""
    segments: list[list[str]] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    request: Request | None = None
    handle: GenerationHandle | None = None
    decoder: TextDecoder | None = None
    asked_at: float = 0.0
    waited: float = 0.0
    first_at: float = 0.0
    ended_at: float = 0.0
    shown: dict[str, Any] = field(default_factory=dict)

    def changes(self, **more: Any) -> Change:
        """Return what has changed since the last report, and `more`."""
        now: dict[str, Any] = {"s": self.state, "n": self.tokens, "p": self.place}
        if self.first is not None:
            now["f"] = round(self.first, 2)
        if self.speed is not None:
            now["v"] = round(self.speed, 1)
        if self.note:
            now["e"] = self.note
        change = {key: value for key, value in now.items() if self.shown.get(key) != value}
        self.shown.update(change)
        return {**change, **more}

    def whole(self) -> Change:
        """Return everything that the page shows of this tile."""
        return {"i": self.index, **self.shown, "turns": [[question, answer] for question, answer in self.segments]}


class Wall:
    """Concurrent conversations of one visitor. `tick` looks at all of them; it may be called from any thread.

    Args:
        serving: The engine.
        prompts: The first questions; repeated if there are more chats than prompts.
        settings: The settings of every answer.
        chats: Number of chats at the start.
        turns: Questions per chat; all after the first are follow-ups.
        stagger: Seconds between the starts of two chats, up to `MOST_STAGGER`; 0 lets all of them arrive together.
        owner: The visitor's address; the engine's rows are divided among addresses.
        limits: The largest number of new tokens of an answer, by chat; overrides the settings.

    Attributes:
        tiles: The chats.
        started: When the first question was asked, by the clock; None before.
        seconds: Time from then until now, or until the last chat's end.
    """

    def __init__(
        self,
        serving: Serving,
        prompts: Sequence[str],
        settings: Settings,
        *,
        chats: int,
        turns: int = 1,
        stagger: float = 0.0,
        owner: str = "",
        limits: Sequence[int] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not prompts:
            raise ValueError("There is no prompt: write at least one line.")
        self._serving = serving
        self._settings = settings
        self._ends = ends_of(serving.chat_model)
        self._prompts = itertools.cycle(prompts)
        self._turns = min(max(turns, 1), MOST_TURNS)
        self._stagger = min(max(stagger, 0.0), MOST_STAGGER)
        # All chats of a wall without an owner still belong to one visitor.
        self._owner = owner or secrets.token_hex(8)
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._stopped = False
        self._unwanted: set[int] = set()
        self.started: float | None = None
        self.seconds = 0.0
        self.tiles: list[Tile] = []
        self.add(chats)

    @property
    def over(self) -> bool:
        """Whether all chats have ended."""
        return all(tile.state in OVER for tile in self.tiles)

    @property
    def tokens(self) -> int:
        """New tokens of all chats."""
        return sum(tile.tokens for tile in self.tiles)

    def count(self, *states: str) -> int:
        """Return how many chats are in one of these states."""
        return sum(tile.state in states for tile in self.tiles)

    def add(self, chats: int) -> int:
        """Let more chats join, up to `MOST_CHATS`; return how many did."""
        with self._lock:
            now = self._clock()
            added = max(0, min(chats, MOST_CHATS - len(self.tiles)))
            for number in range(added):
                questions = [next(self._prompts), *FOLLOW_UPS[: self._turns - 1]]
                self.tiles.append(Tile(len(self.tiles), questions, now + number * self._stagger))
            return added

    def stop(self, tile: int | None = None) -> None:
        """End one chat or all chats, and free their rows and pages. May be called from any thread."""
        if tile is None:
            self._stopped = True
        elif 0 <= tile < len(self.tiles):
            self._unwanted.add(tile)
        for chat in self.tiles:
            if tile is not None and chat.index != tile:
                continue
            if (request := chat.request) is not None:
                self._serving.roster.forget(request)
            if (handle := chat.handle) is not None:
                handle.cancel()

    def tick(self) -> list[Change]:
        """Look at every chat, send the questions that are due, and return what has changed since the last call."""
        with self._lock:
            now = self._clock()
            changes: dict[int, Change] = {}
            for tile in self.tiles:
                if tile.state not in OVER:
                    changes[tile.index] = self._look(tile, now)
            due = [tile for tile in self.tiles if self._is_due(tile, now)]
            if due:
                self._prepare(due)
                for tile in due:
                    asked = {"q": tile.segments[-1][0]} if tile.segments else {}
                    changes[tile.index] = {**changes.get(tile.index, {}), **tile.changes(**asked)}
            roster = self._serving.roster
            entering = [
                (tile, request)
                for tile in self.tiles
                if (request := tile.request) is not None and roster.may_enter(request)
            ]
            if entering:
                self._submit(entering)
                for tile, _ in entering:
                    changes[tile.index] = {**changes.get(tile.index, {}), **tile.changes()}
            places = self._serving.roster.places() if self.count(WAITING) else {}
            for tile in self.tiles:
                asking = tile.handle or tile.request
                place = places.get(asking.request_id, 0) if asking is not None else 0
                if place != tile.place:
                    tile.place = place
                    changes[tile.index] = {**changes.get(tile.index, {}), **tile.changes()}
            if self.started is not None:
                ended = max((tile.ended_at for tile in self.tiles), default=0.0)
                self.seconds = max(0.0, (ended if self.over and ended else now) - self.started)
            return [{"i": index, **change} for index, change in sorted(changes.items()) if change]

    def whole(self) -> list[Change]:
        """Return everything that the page shows, for a page that has missed changes."""
        with self._lock:
            return [tile.whole() for tile in self.tiles]

    def _is_due(self, tile: Tile, now: float) -> bool:
        return tile.handle is None and tile.request is None and tile.state not in OVER and now >= tile.starts_at

    def _look(self, tile: Tile, now: float) -> Change:
        handle = tile.handle
        if handle is None:
            if self._stopped or tile.index in self._unwanted:
                if tile.request is not None:
                    self._serving.roster.forget(tile.request)
                    tile.request = None
                tile.state = STOPPED
                return tile.changes()
            if not tile.state:
                tile.state = SOON
                return tile.changes()
            return {}
        done = handle.done  # read before the tokens: once it is set, all tokens are there
        new = handle.tokens_from(len(tile.token_ids[-1]))
        text = ""
        assert tile.decoder is not None
        if new:
            if not tile.token_ids[-1]:
                tile.first_at = now
                tile.first = tile.first if tile.first is not None else tile.waited + now - tile.asked_at
            tile.token_ids[-1] += new
            tile.tokens += len(new)
            text = tile.decoder.push(*new)
            if now > tile.first_at:
                tile.speed = (len(tile.token_ids[-1]) - 1) / (now - tile.first_at)
        if done:
            text += tile.decoder.flush()
        shown = tile.segments[-1]
        shown[1] = (shown[1] + text)[-_KEPT_CHARACTERS:]
        if done:
            self._finish(tile, handle)
        else:
            tile.state = DECODING if tile.token_ids[-1] else PREFILL if handle.started else WAITING
        return tile.changes(t=text) if text else tile.changes()

    def _finish(self, tile: Tile, handle: GenerationHandle) -> None:
        """Handle the end of an answer. The chat goes on with its next question, or is over."""
        tile.handle = None
        try:
            result = handle.result()
        except Exception as error:  # this chat alone has failed
            tile.state, tile.note = FAILED, explain(error).plain()
            return
        metrics = result.metrics
        tile.ended_at = tile.asked_at + metrics.total_seconds
        tile.speed = metrics.tokens_per_second or tile.speed
        if len(tile.token_ids) == 1:
            first = metrics.time_to_first_token
            tile.first = tile.waited + first if first else tile.first
        tile.messages.append(Message(role="assistant", content=tile.segments[-1][1]))
        if result.finish_reason == "cancelled":
            tile.state = STOPPED
        elif len(tile.token_ids) < len(tile.questions):
            tile.state = SOON
        else:
            tile.state = DONE

    def _prepare(self, tiles: list[Tile]) -> None:
        """Make each chat's next request, and let it wait until it may enter the engine."""
        for tile in tiles:
            question = tile.questions[len(tile.token_ids)]
            tile.messages.append(Message(role="user", content=question))
            tile.segments.append([question, ""])
            tile.token_ids.append([])
            try:
                prompt = build_prompt(self._serving.chat_model.tokenizer, tile.messages, self._settings.system)
                settings = self._settings
                if tile.index < len(self._limits):
                    settings = replace(settings, max_new_tokens=self._limits[tile.index])
                tile.request = settings.request(prompt, self._ends)
            except Exception as error:  # this chat alone has failed
                tile.state, tile.note = FAILED, explain(error).plain()
                continue
            tile.state = WAITING
            tile.asked_at = self._clock()
        for tile in tiles:
            if tile.request is not None:
                self._serving.roster.ask(tile.request, self._owner)
        if self.started is None:
            self.started = self._clock()

    def _submit(self, entering: list[tuple[Tile, Request]]) -> None:
        """Submit these requests together, so that they are computed together."""
        now = self._clock()
        for tile, _ in entering:
            tile.request = None
        try:
            handles = self._serving.manager.submit_requests([request for _, request in entering])
        except Exception:  # one of them failed, and the engine takes all or none: submit them one by one
            handles = []
        if handles:
            self._attach([tile for tile, _ in entering], handles, now)
            return
        for tile, request in entering:
            try:
                self._attach([tile], [self._serving.manager.submit_request(request)], now)
            except Exception as error:  # this chat alone has failed
                self._serving.roster.forget(request)
                tile.state, tile.note = FAILED, explain(error).plain()

    def _attach(self, tiles: list[Tile], handles: list[GenerationHandle], now: float) -> None:
        self._serving.roster.add(*handles)
        for tile, handle in zip(tiles, handles, strict=True):
            tile.handle, tile.decoder = handle, self._decoder()
            tile.waited, tile.asked_at = now - tile.asked_at, now
            tile.state = PREFILL if handle.started else WAITING
            if self._stopped or tile.index in self._unwanted:
                handle.cancel()

    def _decoder(self) -> TextDecoder:
        return TextDecoder(self._serving.chat_model.tokenizer, skip_special_tokens=True)
