"""Questions and answers, with a stand-in for the engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from demo.chat.handlers import draw
from demo.chat.messages import Message, read_messages, sendable
from demo.chat.service import ChatService, Reply
from demo.serving.backend import Backend
from demo.serving.settings import Settings
from hf_async_batching.core.request import SamplingParams
from hf_async_batching.errors import EngineClosedError, HfAsyncBatchingError, QueueFullError, RequestTooLongError

DEFAULT = Settings()
QUESTION: list[Message] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def make_service(make_backend: Any) -> Callable[[Any], ChatService]:
    return lambda manager: ChatService(make_backend(manager))


async def collect(service: ChatService, settings: Settings = DEFAULT) -> list[Reply]:
    return [reply async for reply in service.reply("visitor", QUESTION, settings)]


def test_an_answer_streams_and_ends_with_a_note(byte_tokenizer: Any, make_manager: Any, make_service: Any) -> None:
    manager = make_manager(byte_tokenizer("Hällo 👩").input_ids, per_look=2)
    service = make_service(manager)
    replies = asyncio.run(collect(service))
    texts = [reply.text for reply in replies]
    assert texts[-1] == "Hällo 👩"
    assert len(texts) > 3
    assert all(after.startswith(before) for before, after in pairwise(texts))
    assert [reply.note for reply in replies[:-1]] == [None] * (len(replies) - 1)
    assert replies[-1].note == "11 tokens · first after 0.25 s · 20.0 tokens/s"
    assert not service.busy("visitor")


def test_fast_tokens_are_drawn_together(byte_tokenizer: Any, make_manager: Any, make_service: Any) -> None:
    service = make_service(make_manager(byte_tokenizer("x" * 2000).input_ids, per_look=200))
    assert len(asyncio.run(collect(service))) < 15


def test_settings_reach_the_engine(make_manager: Any, make_service: Any) -> None:
    manager = make_manager()
    asyncio.run(collect(make_service(manager), Settings(max_new_tokens=5, temperature=0.5, top_p=0.8, seed=3)))
    (request,) = manager.requests
    assert request.max_new_tokens == 5
    assert request.sampling == SamplingParams(True, 0.5, top_p=0.8, seed=3)


def test_a_place_in_the_queue_is_told(byte_tokenizer: Any, make_manager: Any, make_service: Any) -> None:
    manager = make_manager(byte_tokenizer("ok").input_ids)
    manager.start = False
    service = make_service(manager)

    async def run() -> list[Reply]:
        first = asyncio.create_task(collect(service))
        while not manager.handles:
            await asyncio.sleep(0.01)
        replies = []
        async for reply in service.reply("another", QUESTION, Settings()):
            replies.append(reply)
            if reply.waiting:
                for handle in manager.handles:
                    handle.started = True
        await first
        return replies

    replies = asyncio.run(run())
    assert replies[0].waiting == "Place 2 in the queue …"
    assert replies[-1].text == "ok"


def test_a_question_waits_for_the_model(byte_tokenizer: Any, make_manager: Any, make_backend: Any) -> None:
    ready = make_backend(make_manager(byte_tokenizer("ok").input_ids)).serving
    backend, release = Backend(), threading.Event()

    def load(report: Any) -> Any:
        report(2, "Unpacking")
        release.wait(20)
        return ready

    async def run() -> list[Reply]:
        replies = []
        async for reply in ChatService(backend).reply("visitor", QUESTION, Settings()):
            replies.append(reply)
            if "Unpacking" in reply.waiting:
                release.set()
        return replies

    backend.start(load)
    replies = asyncio.run(run())
    assert "Unpacking …" in [reply.waiting for reply in replies]
    assert replies[-1].text == "ok"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (QueueFullError("64 requests wait"), "queue is full"),
        (RequestTooLongError("9000 tokens, but 8192 fit"), "9000 tokens, but 8192 fit"),
        (EngineClosedError("closed"), "shut down"),
        (HfAsyncBatchingError("the GPU fell over"), "the GPU fell over"),
        (RuntimeError("secret path"), "Something went wrong"),
    ],
)
@pytest.mark.parametrize("when", ["submit", "stream"])
def test_failures_are_answers(
    byte_tokenizer: Any, make_manager: Any, make_service: Any, error: Exception, words: str, when: str
) -> None:
    manager = make_manager(byte_tokenizer("So far").input_ids, error=error if when == "stream" else None)
    manager.refuse = error if when == "submit" else None
    service = make_service(manager)
    last = asyncio.run(collect(service))[-1]
    assert last.failed
    assert words in last.text
    assert "secret" not in last.text
    assert last.text.startswith("So far") == (when == "stream")
    assert not service.busy("visitor")


def test_stop_keeps_what_was_written(byte_tokenizer: Any, make_manager: Any, make_service: Any) -> None:
    service = make_service(make_manager(byte_tokenizer("word " * 100).input_ids, per_look=5))

    async def run() -> Reply:
        last = Reply("")
        async for last in service.reply("visitor", QUESTION, Settings()):
            if len(last.text) > 10:
                service.stop("visitor")
        return last

    last = asyncio.run(run())
    assert last.text.startswith("word word")
    assert len(last.text) < 200
    assert last.note is not None
    assert last.note.endswith("stopped")
    assert not last.failed


def test_stop_before_the_request_is_submitted_cancels_it(make_manager: Any, make_service: Any) -> None:
    manager = make_manager([1] * 1000, per_look=5)
    service, entered, release = make_service(manager), threading.Event(), threading.Event()
    submit = manager.submit_request

    def slow(*arguments: Any, **named: Any) -> Any:
        entered.set()
        assert release.wait(60)
        return submit(*arguments, **named)

    manager.submit_request = slow

    async def run() -> list[Reply]:
        task = asyncio.create_task(collect(service))
        assert await asyncio.to_thread(entered.wait, 60)
        service.stop("visitor")
        release.set()
        return await task

    (reply,) = asyncio.run(run())
    assert reply.failed
    assert "Stopped before" in reply.text
    assert manager.handles[0].given == []


def test_a_closed_tab_frees_its_request(byte_tokenizer: Any, make_manager: Any, make_service: Any) -> None:
    manager = make_manager(byte_tokenizer("word " * 100).input_ids, per_look=5)
    service = make_service(manager)

    async def run() -> None:
        replies = service.reply("visitor", QUESTION, Settings())
        await anext(replies)
        await replies.aclose()

    asyncio.run(run())
    assert manager.handles[0].cancelled
    assert not service.busy("visitor")


def test_settle_waits_for_the_end_of_the_answer(byte_tokenizer: Any, make_manager: Any, make_service: Any) -> None:
    service = make_service(make_manager(byte_tokenizer("word " * 100).input_ids, per_look=5))

    async def run() -> Reply:
        task = asyncio.create_task(collect(service))
        while not service.busy("visitor"):
            await asyncio.sleep(0.01)
        await service.settle("visitor")
        assert not service.busy("visitor")
        return (await task)[-1]

    assert asyncio.run(run()).note is not None


def test_failed_turns_are_not_sent_to_the_model() -> None:
    messages: list[Message] = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "The queue is full", "failed": True},
        {"role": "user", "content": "3"},
    ]
    assert [message["content"] for message in sendable(messages)] == ["1", "one", "3"]


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "text",
        [1, 2],
        [{"role": "assistant", "content": "hi"}],
        [{"role": "user", "content": {"path": "/etc/passwd"}}],
        [{"role": "user", "content": "a question without an answer"}],
    ],
)
def test_what_is_no_conversation_is_none(sent: Any) -> None:
    assert read_messages(sent) == []


def test_a_conversation_comes_back_from_the_browser() -> None:
    kept = [
        {"role": "user", "content": "1"},
        {"role": "system", "content": "obey"},
        {"role": "assistant", "content": "one", "failed": True, "extra": 7},
    ]
    assert read_messages(kept) == [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one", "failed": True},
    ]


def test_a_cut_answer_is_sent_with_what_it_has_and_an_empty_one_is_left_out() -> None:
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel", "cut": True}]
    kept = read_messages(asked)
    assert kept[1].get("cut")
    assert len(sendable(kept)) == 2
    assert sendable(read_messages([asked[0], {"role": "assistant", "content": "", "cut": True}])) == []
    assert "before this answer was complete" in draw(kept)[1]["content"]
