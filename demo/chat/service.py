"""Answers questions. This module knows the engine and does not know Gradio."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_async_batching.text_stream import TextDecoder

from ..serving.backend import Backend
from ..serving.pools import PROMPTS
from ..serving.problems import explain
from ..serving.serving import Serving
from ..serving.settings import Settings, ends_of
from ..serving.text import build_prompt
from .messages import LONGEST_HISTORY, Message, sendable

if TYPE_CHECKING:
    from hf_async_batching import GenerationHandle, GenerationResult
    from hf_async_batching.core.request import Request

logger = logging.getLogger(__name__)

# The service looks at the engine this often, and the engine never waits for it. An answer is drawn at most twenty
# times a second, and a slow browser costs the engine nothing.
LOOK_SECONDS = 0.05
# One owner's answers are looked at that often up to this number; with more, each is looked at more rarely.
QUICK_ANSWERS = 4
# Drawing the longest conversation may hold up others for a fiftieth of this, out of each second.
DRAW_SECONDS = 0.5
_SETTLE_SECONDS = 5.0
_ENDINGS = {
    "eos": "",
    "stop": "",
    "length": "cut off at the limit for new tokens",
    "cancelled": "stopped",
}


@dataclass(frozen=True)
class Reply:
    """The answer so far.

    Attributes:
        text: The whole answer so far.
        waiting: What the answer waits for, while it has no text.
        note: Set on the last reply only: how long the answer took; may be empty.
        failed: Whether the text is an error's and not the model's.
        discarded: Whether the visitor cleared the chat meanwhile. The answer must then not be shown.
        error: The error of a failed answer.
    """

    text: str
    waiting: str = ""
    note: str | None = None
    failed: bool = False
    discarded: bool = False
    error: Exception | None = None


class _Turn:
    """One answer being written for one visitor. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.discarded = False
        self.cancelled = False
        self._lock = threading.Lock()
        self._handle: GenerationHandle | None = None

    def attach(self, handle: GenerationHandle) -> None:
        """Remember the request. If Stop was pressed while it was being submitted, cancel it at once."""
        with self._lock:
            self._handle = handle
            late = self.cancelled
        if late:
            handle.cancel()

    def cancel(self) -> None:
        with self._lock:
            self.cancelled = True
            handle = self._handle
        if handle is not None:
            handle.cancel()


class ChatService:
    """Answers visitors' messages on one engine, at most one answer per visitor at a time."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._turns: dict[str, _Turn] = {}
        self._asking = Counter[str]()

    def _pause(self, owner: str) -> float:
        """Seconds between two looks at an answer: each part costs Gradio time, and one owner gets a share of it."""
        return LOOK_SECONDS * max(1.0, self._asking[owner] / QUICK_ANSWERS)

    def busy(self, visitor: str) -> bool:
        """Say whether an answer is being written for this visitor."""
        return visitor in self._turns

    def stop(self, visitor: str) -> None:
        """Cancel this visitor's answer, if there is one: the engine frees its row and pages."""
        turn = self._turns.get(visitor)
        if turn is not None:
            turn.cancel()

    def discard(self, visitor: str) -> None:
        """Cancel this visitor's answer, and stop showing it."""
        turn = self._turns.get(visitor)
        if turn is not None:
            turn.discarded = True
            turn.cancel()

    async def ready(self, visitor: str) -> bool:
        """Say whether this visitor may ask; wait until a discarded answer has ended."""
        turn = self._turns.get(visitor)
        if turn is not None and turn.discarded:
            await self.settle(visitor)
        return not self.busy(visitor)

    async def settle(self, visitor: str) -> None:
        """Cancel this visitor's answer, and wait until its last part has been handed out."""
        turn = self._turns.get(visitor)
        if turn is None:
            return
        turn.cancel()
        try:
            await asyncio.wait_for(turn.done.wait(), _SETTLE_SECONDS)
        except TimeoutError:
            logger.warning("An answer did not end within %.0f s of being cancelled.", _SETTLE_SECONDS)

    async def reply(
        self, visitor: str, messages: list[Message], settings: Settings, owner: str = ""
    ) -> AsyncIterator[Reply]:
        """Yield the growing answer to the last of `messages`; the last reply carries a note.

        Args:
            visitor: The tab or API call that asks.
            messages: The conversation.
            settings: System prompt and sampling.
            owner: The address of the visitor; the engine's rows are shared out by it.

        An error of the engine or the request is not raised: it becomes a reply that says what went wrong.
        Closing this generator early (a closed tab) cancels the request.
        """
        turn = self._turns[visitor] = _Turn()
        text = waiting = ""
        serving: Serving | None = None
        request: Request | None = None
        # Each part of the answer draws the whole conversation anew, so a longer conversation gets fewer parts.
        drawing = DRAW_SECONDS * sum(len(message["content"]) for message in messages) / LONGEST_HISTORY
        owner = owner or visitor
        self._asking[owner] += 1
        try:
            while (serving := self._backend.serving) is None and not turn.cancelled:
                stage = self._backend.stage
                if stage.failed or self._backend.zero is not None:
                    self._backend.require()  # says why there is none
                if waiting != f"{stage.text} …":
                    waiting = f"{stage.text} …"
                    yield Reply("", waiting=waiting)
                await asyncio.sleep(LOOK_SECONDS)
            if serving is None:
                yield Reply("*Stopped before the first word.*", note="", failed=True, discarded=turn.discarded)
                return
            request = await PROMPTS.run_for(owner, _request, serving, messages, settings)
            serving.roster.ask(request, owner)
            while not serving.roster.may_enter(request) and not turn.cancelled:
                told, waiting = waiting, _waits_at(serving.roster.places().get(request.request_id, 1))
                if told != waiting:
                    yield Reply("", waiting=waiting)
                await asyncio.sleep(self._pause(owner))
            if turn.cancelled:
                yield Reply("*Stopped before the first word.*", note="", failed=True, discarded=turn.discarded)
                return
            handle = await PROMPTS.run(self._submit, serving, turn, request)
            decoder, position = TextDecoder(serving.chat_model.tokenizer, skip_special_tokens=True), 0
            while True:
                done = handle.done  # read before the tokens: once it is set, all tokens are there
                tokens = handle.tokens_from(position)
                position += len(tokens)
                new = decoder.push(*tokens)
                text += new
                if done:
                    break
                if new and not turn.discarded:
                    yield Reply(text)
                elif not text and (place := serving.roster.places().get(handle.request_id)):
                    told, waiting = waiting, _waits_at(place)
                    if told != waiting:
                        yield Reply("", waiting=waiting)
                await asyncio.sleep(self._pause(owner) + (drawing if text else 0.0))
            text += decoder.flush()
            result = handle.result()
            if text.strip() or turn.discarded:
                yield Reply(text, note=describe(result), discarded=turn.discarded)
            else:
                why = "Stopped before the first word." if result.finish_reason == "cancelled" else "(An empty answer.)"
                yield Reply(f"*{why}*", note="", failed=True)
        except Exception as error:  # the error reaches its own visitor only
            told = (f"{text}\n\n" if text else "") + explain(error).markdown()
            yield Reply(told, note="", failed=True, discarded=turn.discarded, error=error)
        finally:
            turn.cancel()
            turn.done.set()
            self._asking[owner] -= 1
            if not self._asking[owner]:
                del self._asking[owner]
            if serving is not None and request is not None:
                serving.roster.forget(request)
            if self._turns.get(visitor) is turn:
                del self._turns[visitor]

    def _submit(self, serving: Serving, turn: _Turn, request: Request) -> GenerationHandle:
        handle = serving.manager.submit_request(request)
        serving.roster.add(handle)
        turn.attach(handle)
        return handle


def _request(serving: Serving, messages: list[Message], settings: Settings) -> Request:
    prompt = build_prompt(serving.chat_model.tokenizer, sendable(messages), settings.system)
    return settings.request(prompt, ends_of(serving.chat_model))


def _waits_at(place: int) -> str:
    return f"Place {place} in the queue …"


def describe(result: GenerationResult) -> str:
    """Return one line about a finished answer: tokens, time to the first token, speed, why it ended."""
    count, metrics = len(result.token_ids), result.metrics
    parts = [f"{count} token{'' if count == 1 else 's'}"]
    if metrics.time_to_first_token:
        parts.append(f"first after {metrics.time_to_first_token:.2f} s")
    if metrics.tokens_per_second:
        parts.append(f"{metrics.tokens_per_second:.1f} tokens/s")
    if metrics.cached_prompt_tokens:
        parts.append(f"{metrics.cached_prompt_tokens} prompt tokens from the prefix cache")
    parts.append(_ENDINGS.get(result.finish_reason, result.finish_reason))
    return " · ".join(part for part in parts if part)
