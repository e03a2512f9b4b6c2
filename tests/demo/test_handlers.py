"""What the buttons do to the page, with a stand-in for the engine and no browser."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from demo.chat import ChatService, Message
from demo.handlers import MAX_NEW_TOKENS, ChatHandlers, Page, read_settings

KNOBS = ("", 64, 0.7, 0.9, False)
VISITOR: Any = SimpleNamespace(session_hash="visitor")
TURNS: list[Message] = [
    {"role": "user", "content": "1 <b>"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "2"},
    {"role": "assistant", "content": "two"},
]


@pytest.fixture
def make_handlers(byte_tokenizer: Any) -> Callable[[Any], ChatHandlers]:
    def make(manager: Any) -> ChatHandlers:
        chat_model: Any = SimpleNamespace(tokenizer=byte_tokenizer)
        return ChatHandlers(ChatService(manager, chat_model))

    return make


async def collect(pages: AsyncIterator[Page]) -> list[Page]:
    return [page async for page in pages]


def event(index: int) -> Any:
    return SimpleNamespace(index=index)


def test_a_question_is_shown_at_once_and_its_answer_kept(
    byte_tokenizer: Any, make_manager: Any, make_handlers: Any
) -> None:
    handlers = make_handlers(make_manager(byte_tokenizer("Hello <you>").input_ids))
    pages = asyncio.run(collect(handlers.submit(" Hi ", [], *KNOBS, request=VISITOR)))
    history, chatbot, box, _, send, stop = pages[0]
    assert history == [{"role": "user", "content": "Hi"}]
    assert [message["content"] for message in chatbot] == ["Hi", "…"]
    assert (box, send["visible"], stop["visible"]) == ("", False, True)
    history, chatbot, _, note, send, stop = pages[-1]
    assert history[-1] == {"role": "assistant", "content": "Hello <you>", "failed": False}
    assert chatbot[-1]["content"] == r"Hello \<you>"
    assert "tokens/s" in note
    assert (send["visible"], stop["visible"]) == (True, False)


@pytest.mark.parametrize("text", ["", "  \n "])
def test_an_empty_question_is_not_asked(make_manager: Any, make_handlers: Any, text: str) -> None:
    manager = make_manager()
    asyncio.run(collect(make_handlers(manager).submit(text, [], *KNOBS, request=VISITOR)))
    assert manager.prompts == []


def test_a_second_question_waits_for_the_first_answer(make_manager: Any, make_handlers: Any) -> None:
    manager = make_manager([1] * 20, delay=0.01)
    handlers = make_handlers(manager)

    async def run() -> None:
        first = asyncio.create_task(collect(handlers.submit("1", [], *KNOBS, request=VISITOR)))
        await asyncio.sleep(0.1)
        await collect(handlers.submit("2", [], *KNOBS, request=VISITOR))
        await first

    asyncio.run(run())
    assert len(manager.prompts) == 1


def test_after_clear_no_page_shows_the_answer(byte_tokenizer: Any, make_manager: Any, make_handlers: Any) -> None:
    manager = make_manager(byte_tokenizer("word " * 200).input_ids, delay=0.01)
    handlers = make_handlers(manager)
    pages: list[Page] = []

    async def ask(text: str) -> None:
        async for page in handlers.submit(text, [], *KNOBS, request=VISITOR):
            pages.append(page)

    async def run() -> None:
        first = asyncio.create_task(ask("Hi"))
        await asyncio.sleep(0.2)
        pages.append(await handlers.clear(VISITOR))
        cleared = len(pages)
        second = asyncio.create_task(ask("Ho"))
        await first
        assert len(pages) == cleared + 1
        assert pages[-1][0] == pages[-1][1] == pages[cleared - 1][1] == []
        await asyncio.sleep(0.2)
        await handlers.stop(VISITOR)
        await second

    asyncio.run(run())
    assert len(manager.prompts) == 2, "a question right after Clear waits for the old answer to end"
    assert pages[-1][0][0]["content"] == "Ho"


def test_retry_forgets_what_came_after(byte_tokenizer: Any, make_manager: Any, make_handlers: Any) -> None:
    manager = make_manager(byte_tokenizer("uno").input_ids)
    pages = asyncio.run(collect(make_handlers(manager).retry(TURNS, *KNOBS, event=event(1), request=VISITOR)))
    assert [message["content"] for message in pages[-1][0]] == ["1 <b>", "uno"]
    assert "two" not in byte_tokenizer.decode(manager.prompts[0])


@pytest.mark.parametrize(("index", "left", "text"), [(2, 2, "2"), (3, 2, "2"), (0, 0, "1 <b>"), (9, 2, "2")])
def test_undo_takes_the_question_back(make_manager: Any, make_handlers: Any, index: int, left: int, text: str) -> None:
    page = asyncio.run(make_handlers(make_manager()).undo(TURNS, event(index), VISITOR))
    assert page[0] == TURNS[:left]
    assert page[2] == text


def test_settings_stay_within_bounds() -> None:
    settings = read_settings("Be brief.", 10**9, -5, 7, True)
    assert (settings.max_new_tokens, settings.temperature, settings.top_p) == (MAX_NEW_TOKENS, 0.1, 1.0)
    assert read_settings("", 0, 0, 0, False).max_new_tokens == 1
