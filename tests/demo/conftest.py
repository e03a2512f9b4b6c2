"""What the tests of the demo share: a stand-in for the engine, a tiny tokenizer, a browser."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# The demo is a folder of the repository, not part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


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


@dataclass
class FakeHandle:
    """Streams `tokens`, one every `delay` seconds, until it is cancelled."""

    tokens: Sequence[int]
    delay: float
    request_id: int
    error: Exception | None = None
    given: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self._cancelled = threading.Event()

    def __aiter__(self) -> AsyncIterator[int]:
        return self._stream()

    async def _stream(self) -> AsyncIterator[int]:
        for token in self.tokens:
            await asyncio.sleep(self.delay)
            if self._cancelled.is_set():
                self.finish_reason = "cancelled"
                return
            self.given.append(token)
            yield token
        if self.error is not None:
            raise self.error
        self.finish_reason = "eos"

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        self._cancelled.set()

    def result(self, timeout: float | None = None) -> Any:
        metrics = SimpleNamespace(queue_seconds=0.0, time_to_first_token=0.25, tokens_per_second=20.0)
        return SimpleNamespace(token_ids=self.given, finish_reason=self.finish_reason, metrics=metrics)


class FakeManager:
    """Takes the calls that the demo makes of a `GenerationManager`, and remembers them."""

    def __init__(self, tokens: Sequence[int] = (), delay: float = 0.0, error: Exception | None = None) -> None:
        self.tokens, self.delay, self.error = tokens, delay, error
        self.refuse: Exception | None = None
        self.handles: list[FakeHandle] = []
        self.calls: list[dict[str, Any]] = []
        self.prompts: list[list[int]] = []
        self._ids = itertools.count(1)

    def submit(self, input_ids: list[int], **arguments: Any) -> FakeHandle:
        if self.refuse is not None:
            raise self.refuse
        self.prompts.append(input_ids)
        self.calls.append(arguments)
        handle = FakeHandle(self.tokens, self.delay, next(self._ids), self.error)
        self.handles.append(handle)
        return handle

    def stats(self) -> Any:
        running = sum(handle.finish_reason is None for handle in self.handles)
        return SimpleNamespace(
            running=running,
            waiting=0,
            tokens_per_second=20.5 * running,
            busy_fraction=0.93 if running else 0.0,
            pages_in_use=7 * running,
            pages_total=1024,
        )


@pytest.fixture
def make_manager() -> Callable[..., FakeManager]:
    """Make stand-ins for the engine."""
    return FakeManager


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
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        except Error as error:
            unavailable(f"no Chromium to run the page in: {error.message.splitlines()[0]}")
            raise
        yield chromium
        chromium.close()
