"""What the tests of the demo share: a stand-in for the engine, a tiny tokenizer, a browser."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.demo import MACHINE, FakeManager, Served, wait_until_idle
from support.demo_page import ANSWER_MS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# The demo is a folder of the repository, not part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from demo.app import build_app
from demo.page.style import launch_options
from demo.serving.backend import Backend
from demo.serving.models import load_chat_model
from demo.serving.roster import Roster
from demo.serving.serving import Serving, serve
from demo.tools.browser import launch

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known also where only this folder is run."""
    config.addinivalue_line("markers", "browser: needs a Chromium browser")


@pytest.fixture(scope="session")
def unavailable() -> Callable[[str], None]:
    """Return what ends a test for which something is missing: it skips with a reason, and in CI it fails."""

    def end(reason: str) -> None:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)

    return end


@pytest.fixture
def make_manager() -> Callable[..., FakeManager]:
    """Make stand-ins for the engine."""
    return FakeManager


@pytest.fixture
def make_backend(byte_tokenizer: Any) -> Callable[[Any], Backend]:
    """Make a backend of a stand-in for the engine."""

    def make(manager: Any) -> Backend:
        model = SimpleNamespace(generation_config=GenerationConfig(), device=torch.device("cpu"), dtype=torch.float32)
        chat_model: Any = SimpleNamespace(tokenizer=byte_tokenizer, model=model, name="fake", source="Made up.")
        return Backend(Serving(manager, chat_model, MACHINE, 1, Roster()))

    return make


@pytest.fixture(scope="session")
def serving() -> Iterator[Serving]:
    """A real engine around a tiny model with random weights."""
    made = serve(load_chat_model("random:tiny", device="cpu"), MACHINE, max_rows=16, num_pages=384)
    yield made
    made.manager.close()


@pytest.fixture(scope="session")
def served(serving: Serving) -> Iterator[Served]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    backend = Backend(serving)
    app = build_app(backend)
    app.launch(server_name="127.0.0.1", server_port=port, quiet=True, prevent_thread_lock=True, **launch_options())
    yield Served(f"http://127.0.0.1:{port}/", serving, backend)
    app.close(verbose=False)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per UTF-8 byte and two control tokens: characters span tokens in it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)])
    fast: Any = PreTrainedTokenizerFast
    result = fast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=CHAT_TEMPLATE)
    assert isinstance(result, PreTrainedTokenizerFast)
    return result


@pytest.fixture(scope="module")
def browser(unavailable: Callable[[str], None]) -> Iterator[Browser]:
    """Return a headless Chromium: the system's, or the one that Playwright installed.

    It lives no longer than the module: while it does, Playwright keeps an event loop running in this thread, and
    tests with `asyncio.run` would fail.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        unavailable(f"no browser tests without Playwright: {error}")
        raise
    with sync_playwright() as playwright:
        try:
            chromium = launch(playwright)
        except Error as error:
            unavailable(f"no Chromium to run the page in: {error.message.splitlines()[0]}")
            raise
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Browser, served: Served) -> Iterator[Callable[..., Page]]:
    """Open the page in a browser of its own; afterwards nothing may have gone wrong or have left this machine."""
    contexts, complaints = [], []

    def check(request: Any) -> None:
        if not request.url.startswith((served.url, "data:", "blob:")):
            complaints.append(f"asked another host: {request.url}")

    def open_one(width: int = 1280, height: int = 860, scheme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(ANSWER_MS)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", check)
        page.goto(served.url)
        page.get_by_label("Your message").wait_for()
        page.wait_for_function("Number(document.querySelector('.panel')?.dataset.beats) > 0")
        return page

    open_one.forgiven = ()  # type: ignore[attr-defined]
    yield open_one
    for context in contexts:
        context.close()
    wait_until_idle(served.serving)
    assert [text for text in complaints if not any(known in text for known in open_one.forgiven)] == []  # type: ignore[attr-defined]
