"""The embedded model answers in words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from support.demo import MACHINE

from demo.chat.messages import Message
from demo.chat.service import ChatService
from demo.serving.backend import Backend
from demo.serving.models import ModelLoadError, embedded_model_dir, load_chat_model
from demo.serving.serving import serve
from demo.serving.settings import Settings


@pytest.mark.timeout(300)
def test_the_embedded_model_knows_a_capital(unavailable: Callable[[str], None]) -> None:
    try:
        chat_model = load_chat_model(str(embedded_model_dir()), device="cpu")
    except ModelLoadError as error:
        unavailable(f"no model to chat with: {error}")
        raise
    serving = serve(chat_model, MACHINE, max_rows=4, num_pages=8)

    async def run() -> list[str]:
        asked = [Message(role="user", content="What is the capital of France?")]
        replies = ChatService(Backend(serving)).reply("visitor", asked, Settings(max_new_tokens=12, greedy=True))
        return [reply.text async for reply in replies]

    try:
        assert "Paris" in asyncio.run(run())[-1]
    finally:
        serving.manager.close()
