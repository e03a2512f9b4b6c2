"""What happens between a question and its answer. Knows the engine; knows nothing of Gradio."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from hf_async_batching.errors import EngineClosedError, HfAsyncBatchingError, QueueFullError, RequestTooLongError

from .models import ChatModel
from .text import Detokenizer, build_prompt

if TYPE_CHECKING:
    from hf_async_batching import GenerationHandle, GenerationManager, GenerationResult

logger = logging.getLogger(__name__)

# A page is drawn at most this often: more is not seen, and costs the browser and the server.
REDRAW_SECONDS = 0.05
_SETTLE_SECONDS = 5.0
_ENDINGS = {
    "eos": "",
    "stop": "",
    "length": "cut off at the limit for new tokens",
    "cancelled": "stopped",
}


class Message(TypedDict):
    """One message of a conversation, as it was written. Failed ones are shown but never sent to the model."""

    role: str
    content: str
    failed: NotRequired[bool]


@dataclass(frozen=True)
class Settings:
    """What the page's controls say."""

    system: str = ""
    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9
    greedy: bool = False

    def generate_arguments(self) -> dict[str, Any]:
        """Return the arguments of `generate` that these settings mean."""
        if self.greedy:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {"max_new_tokens": self.max_new_tokens, **sampling}


@dataclass(frozen=True)
class Reply:
    """The answer so far.

    Attributes:
        text: all of it, not only what is new.
        note: set on the last reply only: how long the answer took, or empty where there is nothing to say.
        failed: whether the text is not the model's.
        discarded: whether the visitor cleared the chat in the meantime: nothing of the answer may be shown.
    """

    text: str
    note: str | None = None
    failed: bool = False
    discarded: bool = False


class _Turn:
    """One answer being written for one visitor. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.discarded = False
        self._lock = threading.Lock()
        self._cancelled = False
        self._handle: GenerationHandle | None = None

    def attach(self, handle: GenerationHandle) -> None:
        """Remember the request. If Stop was pressed while it was being submitted, cancel it at once."""
        with self._lock:
            self._handle = handle
            late = self._cancelled
        if late:
            handle.cancel()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            handle = self._handle
        if handle is not None:
            handle.cancel()


class ChatService:
    """Answers visitors' messages on one engine, at most one answer per visitor at a time."""

    def __init__(self, manager: GenerationManager, chat_model: ChatModel) -> None:
        self._manager = manager
        self._tokenizer = chat_model.tokenizer
        self._turns: dict[str, _Turn] = {}

    def busy(self, visitor: str) -> bool:
        """Say whether an answer is being written for this visitor."""
        return visitor in self._turns

    def stop(self, visitor: str) -> None:
        """Cancel this visitor's answer, if there is one: the engine frees its row and pages."""
        turn = self._turns.get(visitor)
        if turn is not None:
            turn.cancel()

    def discard(self, visitor: str) -> None:
        """Cancel this visitor's answer, and show nothing more of it."""
        turn = self._turns.get(visitor)
        if turn is not None:
            turn.discarded = True
            turn.cancel()

    async def ready(self, visitor: str) -> bool:
        """Say whether this visitor may ask; waits for the end of an answer that was discarded."""
        turn = self._turns.get(visitor)
        if turn is not None and turn.discarded:
            await self.settle(visitor)
        return not self.busy(visitor)

    async def settle(self, visitor: str) -> None:
        """Cancel this visitor's answer and wait until the last of it has been handed out."""
        turn = self._turns.get(visitor)
        if turn is None:
            return
        turn.cancel()
        try:
            await asyncio.wait_for(turn.done.wait(), _SETTLE_SECONDS)
        except TimeoutError:
            logger.warning("An answer did not end within %.0f s of being cancelled.", _SETTLE_SECONDS)

    async def reply(self, visitor: str, messages: list[Message], settings: Settings) -> AsyncIterator[Reply]:
        """Yield the growing answer to the last of `messages`; the last reply carries a note.

        Never raises because of the engine or the request: a failure is a reply that says what went wrong.
        Closing this generator early (a closed tab) cancels the request.
        """
        turn = self._turns[visitor] = _Turn()
        detokenizer = Detokenizer(self._tokenizer)
        text, drawn = "", 0.0
        try:
            handle = await asyncio.to_thread(self._submit, turn, messages, settings)
            async for token in handle:
                text += detokenizer.push(token)
                now = time.monotonic()
                if text and not turn.discarded and now - drawn >= REDRAW_SECONDS:
                    drawn = now
                    yield Reply(text)
            text += detokenizer.flush()
            result = await asyncio.to_thread(handle.result, _SETTLE_SECONDS)
            if text.strip() or turn.discarded:
                yield Reply(text, note=describe(result), discarded=turn.discarded)
            else:
                why = "Stopped before the first word." if result.finish_reason == "cancelled" else "(An empty answer.)"
                yield Reply(f"*{why}*", note="", failed=True)
        except Exception as error:  # its own visitor is told, and nobody else: that is the page's part of isolation
            told = (f"{text}\n\n" if text else "") + explain(error)
            yield Reply(told, note="", failed=True, discarded=turn.discarded)
        finally:
            turn.cancel()
            turn.done.set()
            if self._turns.get(visitor) is turn:
                del self._turns[visitor]

    def _submit(self, turn: _Turn, messages: list[Message], settings: Settings) -> GenerationHandle:
        # In a thread: the first request of all starts the engine, and that may take seconds.
        prompt = build_prompt(self._tokenizer, sendable(messages), settings.system)
        handle = self._manager.submit(prompt, **settings.generate_arguments())
        turn.attach(handle)
        return handle


def sendable(messages: list[Message]) -> list[Message]:
    """Leave out failed answers and the questions they belong to: chat templates insist on alternating roles."""
    kept: list[Message] = []
    for message in messages:
        if message.get("failed"):
            if kept and kept[-1]["role"] == "user":
                kept.pop()
        else:
            kept.append(message)
    return kept


def describe(result: GenerationResult) -> str:
    """Return one line on a finished answer: tokens, time to the first of them, speed, why it ended."""
    count, metrics = len(result.token_ids), result.metrics
    parts = [f"{count} token{'' if count == 1 else 's'}"]
    if metrics.time_to_first_token:
        parts.append(f"first after {metrics.time_to_first_token:.2f} s")
    if metrics.tokens_per_second:
        parts.append(f"{metrics.tokens_per_second:.1f} tokens/s")
    parts.append(_ENDINGS.get(result.finish_reason, result.finish_reason))
    return " · ".join(part for part in parts if part)


def explain(error: Exception) -> str:
    """Say in the visitor's words what went wrong and what helps."""
    if isinstance(error, QueueFullError):
        return "**The engine's queue is full.** Please try again in a moment."
    if isinstance(error, RequestTooLongError):
        return f"**This conversation is too long.** Clear the chat or ask for fewer new tokens.\n\n{error}"
    if isinstance(error, EngineClosedError):
        return "**The engine has been shut down.** Please reload the page later."
    logger.error("An answer failed.", exc_info=error)
    if isinstance(error, HfAsyncBatchingError):
        return f"**The engine could not answer.** {error}"
    return f"**Something went wrong on the server** ({type(error).__name__}). Please try again."
