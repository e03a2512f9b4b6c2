"""What the chat's buttons do: each handler turns an event into new values for the page's components."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr

from ..serving.settings import LONGEST_TEXT, Settings
from ..serving.text import display_markdown, note_html
from ..serving.visitor import owner_of, visitor_of
from .messages import Message, read_messages
from .service import ChatService

# While an answer is being written, the browser saves it once in this many seconds.
_KEEP_SECONDS = 1.0
_CUT = "\n\n*The page was left before this answer was complete. Retry writes it anew.*"
# What handlers return, in the order of the page's outputs: history, chatbot, message box, note, Send, Stop.
Page = tuple[Any, Any, Any, Any, Any, Any]


class ChatHandlers:
    """The chat's event handlers.

    Gradio passes `event` and `request` by their types; the session hash in the request names the visitor. They come
    before `*knobs`, because Gradio passes nothing after it. The visitor's browser keeps the history.
    """

    def __init__(self, service: ChatService) -> None:
        self._service = service

    async def submit(self, request: gr.Request, text: str, history: Any, *knobs: Any) -> AsyncIterator[Page]:
        """Send the text in the message box."""
        visitor, text = visitor_of(request), str(text or "").strip()[:LONGEST_TEXT]
        if not text or not await self._service.ready(visitor):
            yield _page()
            return
        asked = [*read_messages(history), Message(role="user", content=text)]
        settings = Settings.within_bounds(*knobs)
        yield _page(messages=_cut(asked), drawn=_waiting(asked), box="", note="", running=True)
        async for page in self._answer(asked, settings, request):
            yield page

    async def example(
        self, event: gr.SelectData, request: gr.Request, history: Any, *knobs: Any
    ) -> AsyncIterator[Page]:
        """Send the example that the visitor clicked."""
        async for page in self.submit(request, event.value["text"], history, *knobs):
            yield page

    async def retry(self, event: gr.RetryData, request: gr.Request, history: Any, *knobs: Any) -> AsyncIterator[Page]:
        """Answer a question again, and remove everything after it."""
        messages = read_messages(history)
        async for page in self._again(messages[: _question(messages, event.index) + 1], knobs, request):
            yield page

    async def edit(self, event: gr.EditData, request: gr.Request, history: Any, *knobs: Any) -> AsyncIterator[Page]:
        """Answer a rewritten question, and remove everything after the old one."""
        messages = read_messages(history)
        index, text = _question(messages, event.index), str(event.value or "").strip()[:LONGEST_TEXT]
        if index < 0 or not text:
            yield _page(messages=messages)
            return
        async for page in self._again([*messages[:index], Message(role="user", content=text)], knobs, request):
            yield page

    async def undo(self, history: Any, event: gr.UndoData, request: gr.Request) -> Page:
        """Put a question back into the message box, and remove everything after it."""
        await self._service.settle(visitor_of(request))
        messages = read_messages(history)
        index = _question(messages, event.index)
        text = messages[index]["content"] if 0 <= index < len(messages) else ""
        return _page(messages=messages[: max(index, 0)], box=text, note="", running=False)

    async def clear(self, request: gr.Request) -> Page:
        """Remove the conversation."""
        self._service.discard(visitor_of(request))
        return _page(messages=[], note="", running=False)

    async def stop(self, request: gr.Request) -> None:
        """End the current answer; its text so far stays."""
        self._service.stop(visitor_of(request))

    async def restore(self, history: Any) -> list[dict[str, str]]:
        """Draw the conversation that the browser has kept."""
        return draw(read_messages(history))

    def leave(self, request: gr.Request) -> None:
        """Free what a closed tab still uses."""
        self._service.stop(visitor_of(request))

    async def _again(self, messages: list[Message], knobs: Sequence[Any], request: gr.Request) -> AsyncIterator[Page]:
        visitor = visitor_of(request)
        await self._service.settle(visitor)
        if not messages:
            yield _page()
            return
        yield _page(messages=_cut(messages), drawn=_waiting(messages), note="", running=True)
        async for page in self._answer(messages, Settings.within_bounds(*knobs), request):
            yield page

    async def _answer(self, messages: list[Message], settings: Settings, request: gr.Request) -> AsyncIterator[Page]:
        """Write the assistant's next message, for submit, examples, retry and edit."""
        drawn = draw(messages)
        kept_at = time.monotonic()
        # Gradio sends the last page of a generator twice, and the second time may come after another event's page.
        # The last page must still be right then: after Clear it shows a cleared chat.
        async for reply in self._service.reply(visitor_of(request), messages, settings, owner_of(request)):
            if reply.note is None:
                growing = [*drawn, _answer_bubble(display_markdown(reply.text) or reply.waiting)]
                # Saving rewrites the whole conversation in the browser, so it happens only now and then.
                due = time.monotonic() - kept_at > _KEEP_SECONDS
                kept_at = time.monotonic() if due else kept_at
                # Each page sets the buttons: if several arrive together, the browser may see only the last.
                yield _page(messages=_cut(messages, reply.text) if due else None, drawn=growing, running=True)
            elif reply.discarded:
                yield _page(messages=[], note="", running=False)
            else:
                answer = Message(role="assistant", content=reply.text)
                if reply.failed:
                    answer["failed"] = True
                yield _page(messages=[*messages, answer], note=reply.note, running=False)


def draw(messages: list[Message]) -> list[dict[str, str]]:
    """Return a conversation in the form that the Chatbot takes."""
    return [
        {
            "role": message["role"],
            "content": display_markdown(message["content"]) + (_CUT if message.get("cut") else ""),
        }
        for message in messages
    ]


def _page(
    *,
    messages: list[Message] | None = None,
    drawn: list[dict[str, str]] | None = None,
    box: str | None = None,
    note: str | None = None,
    running: bool | None = None,
) -> Page:
    """Return new values for the components that change; the others keep theirs."""
    same = gr.skip()
    if messages is not None and drawn is None:
        drawn = draw(messages)
    return (
        same if messages is None else messages,
        same if drawn is None else drawn,
        same if box is None else box,
        same if note is None else note_html(note),
        same if running is None else gr.update(visible=not running),
        same if running is None else gr.update(visible=running),
    )


def _cut(messages: list[Message], answer: str = "") -> list[Message]:
    """Return what the browser saves of a conversation while its last answer is being written."""
    return [*messages, Message(role="assistant", content=answer, cut=True)]


def _waiting(messages: list[Message]) -> list[dict[str, str]]:
    """Draw a conversation whose next answer has not begun yet."""
    return [*draw(messages), _answer_bubble("…")]


def _answer_bubble(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _question(messages: list[Message], index: int | tuple[int, int]) -> int:
    """Return the index of the user's message at or before `index`, or -1."""
    at = index if isinstance(index, int) else index[0]
    return next((i for i in range(min(at, len(messages) - 1), -1, -1) if messages[i]["role"] == "user"), -1)
