"""The page in a real browser, on the real engine with the embedded model."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from demo.app import build_app
from demo.models import ChatModel, ModelLoadError, embedded_model_dir, load_chat_model
from demo.page import launch_options
from hf_async_batching import BatchingConfig, GenerationManager

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

ANSWER_MS = 60_000
LABELS = ("Tokens per second", "Running", "Waiting", "CPU compute busy", "KV pages in use")


@dataclass(frozen=True)
class Served:
    """A running page."""

    url: str
    manager: GenerationManager


@pytest.fixture(scope="module")
def chat_model(unavailable: Callable[[str], None]) -> ChatModel:
    try:
        return load_chat_model(str(embedded_model_dir()), device="cpu")
    except ModelLoadError as error:
        unavailable(f"no model to chat with: {error}")
        raise


@pytest.fixture(scope="module")
def served(chat_model: ChatModel) -> Iterator[Served]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with GenerationManager(chat_model.model, BatchingConfig(max_rows=8, num_pages=64)) as manager:
        manager.warmup()
        app = build_app(manager, chat_model)
        app.launch(server_name="127.0.0.1", server_port=port, quiet=True, prevent_thread_lock=True, **launch_options())
        yield Served(f"http://127.0.0.1:{port}/", manager)
        app.close(verbose=False)


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
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", check)
        page.goto(served.url)
        page.get_by_label("Your message").wait_for()
        page.locator("#figures dl").wait_for()
        return page

    yield open_one
    for context in contexts:
        context.close()
    wait_until_idle(served.manager)
    assert complaints == []


def ask(page: Page, text: str, tokens: int) -> None:
    page.get_by_label("number input for Max new tokens").fill(str(tokens))
    page.get_by_label("number input for Max new tokens").press("Tab")
    asked = page.locator("#chat .user.message").count()
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")
    # From here on the page shows Stop, until the answer has ended.
    page.locator("#chat .user.message").nth(asked).wait_for()


def answer(page: Page) -> str:
    bubbles = page.locator("#chat .bot.message").all_inner_texts()
    return bubbles[-1].strip() if bubbles else ""


def wait_for_words(page: Page, length: int) -> None:
    """Wait until the last answer has grown to `length` characters."""
    page.wait_for_function(
        "n => [...document.querySelectorAll('#chat .bot.message')].at(-1)?.innerText.length > n",
        arg=length,
        timeout=ANSWER_MS,
    )


def wait_for_end(page: Page) -> None:
    page.get_by_role("button", name="Send").wait_for(timeout=ANSWER_MS)
    page.wait_for_function("[...document.querySelectorAll('#chat .bot.message')].at(-1)?.innerText.trim() !== '…'")
    page.wait_for_timeout(100)  # Markdown is rendered a little after the message arrived


def wait_until_idle(manager: GenerationManager, seconds: float = 20.0) -> None:
    """Wait until the engine has freed everything."""
    deadline = time.monotonic() + seconds
    while (stats := manager.stats()).running or stats.waiting or stats.pages_in_use or stats.rows_in_use:
        assert time.monotonic() < deadline, f"the engine still holds {stats}"
        time.sleep(0.05)


def test_the_page_loads_with_live_figures_and_no_complaints(open_page: Callable[..., Page]) -> None:
    page = open_page()
    assert page.title() == "hf_async_batching"
    header = page.locator("#top").inner_text()
    assert "SmolLM2-135M-Instruct" in header
    assert "CPU" in header
    assert "float32" in header
    assert tuple(page.locator("#figures dt").all_inner_texts()) == LABELS
    assert page.locator("#figures dd").nth(4).inner_text().endswith("/ 64")


def test_everything_to_press_or_fill_has_a_name(open_page: Callable[..., Page]) -> None:
    page = open_page()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, a[href]")]
            .filter(e => e.offsetParent !== null)
            .filter(e => !e.ariaLabel && !e.title && !e.innerText.trim())
            .filter(e => ![...(e.labels ?? [])].some(label => label.innerText.trim()))
            .map(e => e.outerHTML.slice(0, 120))"""
    )
    assert nameless == []


def test_an_answer_streams_while_the_figures_move(open_page: Callable[..., Page], served: Served) -> None:
    page = open_page()
    ask(page, "Tell me a very long story about the sea.", 1000)
    wait_for_words(page, 8)
    early = answer(page)
    assert page.get_by_role("button", name="Stop").is_visible()
    page.wait_for_function("document.querySelectorAll('#figures dd')[1].innerText.trim() === '1'")
    strip = page.locator("#figures").bounding_box()
    page.get_by_role("button", name="Stop").click()
    wait_for_end(page)
    assert len(answer(page)) > len(early)
    assert re.search(r"\d+ tokens · first after [\d.]+ s · [\d.]+ tokens/s", page.locator("#note").inner_text())
    assert page.locator("#figures").bounding_box() == strip, "the strip must not move when figures change"
    wait_until_idle(served.manager)


def test_stop_keeps_the_text_and_frees_the_row(open_page: Callable[..., Page], served: Served) -> None:
    page = open_page()
    ask(page, "Tell me a very long story about the sea.", 1000)
    wait_for_words(page, 20)
    page.get_by_role("button", name="Stop").click()
    wait_for_end(page)
    wait_until_idle(served.manager, seconds=5.0)
    assert served.manager.stats().running == 0
    assert served.manager.stats().pages_in_use == 0
    assert len(answer(page)) > 20
    assert "stopped" in page.locator("#note").inner_text()


def test_a_closed_tab_frees_its_row(open_page: Callable[..., Page], served: Served) -> None:
    page = open_page()
    ask(page, "Tell me a very long story about the sea.", 1000)
    wait_for_words(page, 20)
    page.context.close()
    wait_until_idle(served.manager, seconds=15.0)


def test_two_visitors_share_the_batch(open_page: Callable[..., Page], served: Served) -> None:
    pages = [open_page(), open_page()]
    for page in pages:
        ask(page, "Tell me a long story.", 1000)
    for page in pages:
        wait_for_words(page, 10)
    assert served.manager.stats().running == 2
    pages[0].get_by_role("button", name="Stop").click()
    wait_for_end(pages[0])
    assert served.manager.stats().running == 1, "one visitor's Stop must not end another's answer"


def test_markup_from_users_is_shown_as_text(open_page: Callable[..., Page]) -> None:
    page = open_page()
    text = "<script>window.pwned = 1</script> <img src=x onerror='window.pwned = 1'> <b>bold</b>"
    ask(page, text, 4)
    wait_for_end(page)
    assert page.locator("#chat .user.message").inner_text().strip() == text
    assert page.evaluate("window.pwned") is None


def test_an_over_long_prompt_is_answered_in_the_chat(open_page: Callable[..., Page]) -> None:
    page = open_page()
    ask(page, "7" * 19_000, 16)
    wait_for_end(page)
    assert "too long" in answer(page)
    ask(page, "Hi", 4)
    page.locator("#note p", has_text="tokens").wait_for(timeout=ANSWER_MS)


def test_retry_undo_and_clear(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.get_by_label("Greedy").check()
    expect_disabled = "document.querySelectorAll('.knobs input[type=range]:disabled').length === 2"
    page.wait_for_function(expect_disabled)
    ask(page, "What is the capital of France?", 16)
    wait_for_end(page)
    first = answer(page)
    assert "Paris" in first
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("button", name="Stop").wait_for()
    wait_for_end(page)
    assert answer(page) == first
    assert page.locator("#chat .bot.message").count() == 1
    page.get_by_role("button", name="Undo").click()
    page.locator("#chat .message").first.wait_for(state="detached")
    assert page.get_by_label("Your message").input_value() == "What is the capital of France?"
    ask(page, "Tell me a very long story.", 1000)
    wait_for_words(page, 10)
    page.get_by_role("button", name="Clear").click()
    wait_for_end(page)
    page.get_by_role("button", name="Select example 1").wait_for()


def test_an_example_is_asked_when_clicked(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.get_by_role("button", name="Select example 1").click()
    wait_for_words(page, 10)
    assert page.locator("#chat .user.message").inner_text().startswith("Explain photosynthesis")
    page.get_by_role("button", name="Stop").click()
    wait_for_end(page)


def test_a_phone_has_no_sideways_scroll(open_page: Callable[..., Page]) -> None:
    page = open_page(width=390, height=844)
    assert page.evaluate("scrollY") == 0, "the page must open at its top"
    ask(page, f"Explain {'x' * 120}\n```python\nprint('{'x' * 200}')\n```", 8)
    wait_for_end(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    hidden = "[...document.querySelectorAll('#figures dt')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert page.evaluate(hidden) == 0, "no label of the strip may be cut off"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(open_page: Callable[..., Page], scheme: str) -> None:
    page = open_page(scheme=scheme)
    page.wait_for_function("dark => document.body.classList.contains('dark') === dark", arg=scheme == "dark")
    contrasts = page.evaluate(
        """() => {
          const parse = c => (c.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
          const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const ground = e => { for (; e; e = e.parentElement) {
            const c = parse(getComputedStyle(e).backgroundColor);
            if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
          const result = {};
          const looked = ["#top h1", "#top li", "#figures dt", "#figures dd", "#send", ".knobs label"];
          for (const s of looked) {
            const e = document.querySelector(s), a = light(parse(getComputedStyle(e).color)), b = light(ground(e));
            result[s] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          }
          return result; }"""
    )
    assert {name: ratio for name, ratio in contrasts.items() if ratio < 4.5} == {}
