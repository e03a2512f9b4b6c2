"""What the page's buttons do: each handler turns an event into new values for the page's components."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from .chat import ChatService, Message, Settings
from .page import note_html
from .text import display_markdown

MAX_NEW_TOKENS = 1024
# What handlers return, in the order of the page's outputs: history, chatbot, message box, note, Send, Stop.
Page = tuple[Any, Any, Any, Any, Any, Any]


class ChatHandlers:
    """The chat's event handlers. Gradio passes `request` by its type; the session hash in it names the visitor."""

    def __init__(self, service: ChatService) -> None:
        self._service = service

    async def submit(
        self,
        text: str,
        messages: list[Message],
        system: str,
        max_new_tokens: float,
        temperature: float,
        top_p: float,
        greedy: bool,
        request: gr.Request,
    ) -> AsyncIterator[Page]:
        """Ask what stands in the message box."""
        visitor = _visitor(request)
        if not text.strip() or not await self._service.ready(visitor):
            yield _page()
            return
        asked = [*messages, Message(role="user", content=text.strip())]
        settings = read_settings(system, max_new_tokens, temperature, top_p, greedy)
        yield _page(messages=asked, drawn=_waiting(asked), box="", note="", running=True)
        async for page in self._answer(asked, settings, visitor):
            yield page

    async def example(
        self,
        messages: list[Message],
        system: str,
        max_new_tokens: float,
        temperature: float,
        top_p: float,
        greedy: bool,
        event: gr.SelectData,
        request: gr.Request,
    ) -> AsyncIterator[Page]:
        """Ask the example that was clicked."""
        text = event.value["text"]
        knobs = (system, max_new_tokens, temperature, top_p, greedy)
        async for page in self.submit(text, messages, *knobs, request=request):
            yield page

    async def retry(
        self,
        messages: list[Message],
        system: str,
        max_new_tokens: float,
        temperature: float,
        top_p: float,
        greedy: bool,
        event: gr.RetryData,
        request: gr.Request,
    ) -> AsyncIterator[Page]:
        """Answer a question again, and forget what came after it."""
        visitor = _visitor(request)
        await self._service.settle(visitor)
        kept = messages[: _question(messages, event.index) + 1]
        if not kept:
            yield _page()
            return
        settings = read_settings(system, max_new_tokens, temperature, top_p, greedy)
        yield _page(messages=kept, drawn=_waiting(kept), note="", running=True)
        async for page in self._answer(kept, settings, visitor):
            yield page

    async def undo(self, messages: list[Message], event: gr.UndoData, request: gr.Request) -> Page:
        """Take a question and all after it back into the message box."""
        await self._service.settle(_visitor(request))
        index = _question(messages, event.index)
        text = messages[index]["content"] if 0 <= index < len(messages) else ""
        return _page(messages=messages[: max(index, 0)], box=text, note="", running=False)

    async def clear(self, request: gr.Request) -> Page:
        """Forget the conversation."""
        self._service.discard(_visitor(request))
        return _page(messages=[], note="", running=False)

    async def stop(self, request: gr.Request) -> None:
        """End the answer that is being written; what was written stays."""
        self._service.stop(_visitor(request))

    def leave(self, request: gr.Request) -> None:
        """Free what a closed tab was still using."""
        self._service.stop(_visitor(request))

    async def _answer(self, messages: list[Message], settings: Settings, visitor: str) -> AsyncIterator[Page]:
        """Write the assistant's next message: the one path that submit, examples and retry all take."""
        drawn = draw(messages)
        # Gradio sends the last page of a generator twice, the second time perhaps after the page of another event. So
        # the last page must still be right then: after Clear, this one shows a cleared chat, too.
        async for reply in self._service.reply(visitor, messages, settings):
            if reply.note is None:
                growing = [*drawn, {"role": "assistant", "content": display_markdown(reply.text)}]
                # The buttons again each time: of pages that arrive together, the page may only see the last.
                yield _page(drawn=growing, running=True)
            elif reply.discarded:
                yield _page(messages=[], note="", running=False)
            else:
                answer = Message(role="assistant", content=reply.text, failed=reply.failed)
                yield _page(messages=[*messages, answer], note=reply.note, running=False)


def draw(messages: list[Message]) -> list[dict[str, str]]:
    """Return a conversation as the Chatbot takes it."""
    return [{"role": message["role"], "content": display_markdown(message["content"])} for message in messages]


def read_settings(system: str, max_new_tokens: float, temperature: float, top_p: float, greedy: bool) -> Settings:
    """Return the controls' values within the bounds that the page shows, whatever a client sent."""
    return Settings(
        system=str(system or ""),
        max_new_tokens=int(min(max(max_new_tokens or 1, 1), MAX_NEW_TOKENS)),
        temperature=float(min(max(temperature or 0.1, 0.1), 2.0)),
        top_p=float(min(max(top_p or 0.05, 0.05), 1.0)),
        greedy=bool(greedy),
    )


def _page(
    *,
    messages: list[Message] | None = None,
    drawn: list[dict[str, str]] | None = None,
    box: str | None = None,
    note: str | None = None,
    running: bool | None = None,
) -> Page:
    """Return new values for the components that change; the others keep what they have."""
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


def _waiting(messages: list[Message]) -> list[dict[str, str]]:
    """Draw a conversation whose next answer has not begun yet."""
    return [*draw(messages), {"role": "assistant", "content": "…"}]


def _visitor(request: gr.Request) -> str:
    return str(request.session_hash or "")


def _question(messages: list[Message], index: int | tuple[int, int]) -> int:
    """Return the index of the user's message at or before `index`, or -1."""
    at = index if isinstance(index, int) else index[0]
    return next((i for i in range(min(at, len(messages) - 1), -1, -1) if messages[i]["role"] == "user"), -1)
