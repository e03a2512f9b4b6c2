"""What the buttons do to the page, with a stand-in for the engine and no browser."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from demo.chat.handlers import ChatHandlers, Page
from demo.chat.messages import Message
from demo.chat.service import ChatService

KNOBS = ("", 64, 0.7, 0.9, 0, False, None)
VISITOR: Any = SimpleNamespace(session_hash="visitor")
TURNS: list[Message] = [
    {"role": "user", "content": "1 <b>"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "2"},
    {"role": "assistant", "content": "two"},
]


@pytest.fixture
def make_handlers(make_backend: Any) -> Callable[[Any], ChatHandlers]:
    return lambda manager: ChatHandlers(ChatService(make_backend(manager)))


async def collect(pages: AsyncIterator[Page]) -> list[Page]:
    return [page async for page in pages]


def event(index: int) -> Any:
    return SimpleNamespace(index=index)


def test_a_question_is_shown_at_once_and_its_answer_kept(
    byte_tokenizer: Any, make_manager: Any, make_handlers: Any
) -> None:
    handlers = make_handlers(make_manager(byte_tokenizer("Hello <you>").input_ids))
    pages = asyncio.run(collect(handlers.submit(VISITOR, " Hi ", [], *KNOBS)))
    _, chatbot, box, _, send, stop = pages[0]
    assert [message["content"] for message in chatbot] == ["Hi", "…"]
    assert (box, send["visible"], stop["visible"]) == ("", False, True)
    history, chatbot, _, note, send, stop = pages[-1]
    assert history[-1] == {"role": "assistant", "content": "Hello <you>"}
    assert chatbot[-1]["content"] == r"Hello \<you>"
    assert "tokens/s" in note
    assert (send["visible"], stop["visible"]) == (True, False)


@pytest.mark.parametrize("text", ["", "  \n "])
def test_an_empty_question_is_not_asked(make_manager: Any, make_handlers: Any, text: str) -> None:
    manager = make_manager()
    asyncio.run(collect(make_handlers(manager).submit(VISITOR, text, [], *KNOBS)))
    assert manager.prompts == []


def test_a_second_question_waits_for_the_first_answer(make_manager: Any, make_handlers: Any) -> None:
    manager = make_manager([1] * 40, per_look=1)
    handlers = make_handlers(manager)

    async def run() -> None:
        first = asyncio.create_task(collect(handlers.submit(VISITOR, "1", [], *KNOBS)))
        while not manager.handles:
            await asyncio.sleep(0.01)
        await collect(handlers.submit(VISITOR, "2", [], *KNOBS))
        assert not first.done()
        await handlers.stop(VISITOR)
        await first

    asyncio.run(run())
    assert len(manager.prompts) == 1


def test_after_clear_no_page_shows_the_answer(byte_tokenizer: Any, make_manager: Any, make_handlers: Any) -> None:
    manager = make_manager(byte_tokenizer("word " * 200).input_ids, per_look=2)
    handlers = make_handlers(manager)
    pages: list[Page] = []

    async def ask(text: str) -> None:
        async for page in handlers.submit(VISITOR, text, [], *KNOBS):
            pages.append(page)

    async def run() -> None:
        first = asyncio.create_task(ask("Hi"))
        await asyncio.sleep(0.2)
        pages.append(await handlers.clear(VISITOR))
        cleared = len(pages)
        second = asyncio.create_task(ask("Ho"))
        await first
        # Nothing of the answer, and perhaps already the next question, which waits for its end.
        assert pages[cleared - 1][1] == []
        assert any(page[0] == page[1] == [] for page in pages[cleared:])
        assert len(pages) <= cleared + 2 and "'Hi'" not in str(pages[cleared:])
        await asyncio.sleep(0.2)
        await handlers.stop(VISITOR)
        await second

    asyncio.run(run())
    assert len(manager.prompts) == 2, "a question right after Clear waits for the old answer to end"
    assert pages[-1][0][0]["content"] == "Ho"


def test_retry_forgets_what_came_after(byte_tokenizer: Any, make_manager: Any, make_handlers: Any) -> None:
    manager = make_manager(byte_tokenizer("uno").input_ids)
    pages = asyncio.run(collect(make_handlers(manager).retry(event(1), VISITOR, TURNS, *KNOBS)))
    assert [message["content"] for message in pages[-1][0]] == ["1 <b>", "uno"]
    assert "two" not in byte_tokenizer.decode(manager.prompts[0])


@pytest.mark.parametrize(("index", "left", "text"), [(2, 2, "2"), (3, 2, "2"), (0, 0, "1 <b>"), (9, 2, "2")])
def test_undo_takes_the_question_back(make_manager: Any, make_handlers: Any, index: int, left: int, text: str) -> None:
    page = asyncio.run(make_handlers(make_manager()).undo(TURNS, event(index), VISITOR))
    assert page[0] == TURNS[:left]
    assert page[2] == text


def test_an_edited_question_is_answered_anew(byte_tokenizer: Any, make_manager: Any, make_handlers: Any) -> None:
    manager = make_manager(byte_tokenizer("zwei").input_ids)
    edited: Any = SimpleNamespace(index=2, value=" 2, in German ", previous_value="2")
    pages = asyncio.run(collect(make_handlers(manager).edit(edited, VISITOR, TURNS, *KNOBS)))
    assert [message["content"] for message in pages[-1][0]] == ["1 <b>", "one", "2, in German", "zwei"]
    assert "2, in German" in byte_tokenizer.decode(manager.prompts[0])


def test_a_question_edited_to_nothing_stays(make_manager: Any, make_handlers: Any) -> None:
    manager = make_manager()
    edited: Any = SimpleNamespace(index=0, value=" ", previous_value="1 <b>")
    (page,) = asyncio.run(collect(make_handlers(manager).edit(edited, VISITOR, TURNS, *KNOBS)))
    assert page[0] == TURNS
    assert manager.prompts == []


def test_a_kept_conversation_is_drawn_again(make_manager: Any, make_handlers: Any) -> None:
    drawn = asyncio.run(make_handlers(make_manager()).restore(TURNS))
    assert [message["content"] for message in drawn] == [r"1 \<b>", "one", "2", "two"]
