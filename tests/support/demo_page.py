"""What a visitor does on the demo page, for tests that drive it in a browser."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from demo.tools.browser import press_section, set_numbers

if TYPE_CHECKING:
    from playwright.sync_api import Page

ANSWER_MS = 90_000


def start_wall(page: Page, chats: int, tokens: int, prompts: str | None = None, turns: int = 1) -> None:
    page.get_by_role("tab", name="Chat wall").click()
    press_section(page, "Prompts and settings")
    set_numbers(page, {"Max new tokens per answer": tokens, "Questions per chat": turns})
    if prompts is not None:
        page.get_by_label("Prompts, one per line").fill(prompts)
    press_section(page, "Prompts and settings")
    set_numbers(page, {"Chats at once": chats})
    page.get_by_role("button", name=re.compile(rf"Start {chats} chats?$")).click()
    page.wait_for_function("n => document.querySelectorAll('.tile').length === n", arg=chats)


def wait_for_wall(page: Page) -> None:
    page.wait_for_function("document.querySelector('.wall').dataset.over === 'true'", timeout=ANSWER_MS)
    page.get_by_role("button", name=re.compile("^Start")).wait_for()


def set_longest(page: Page, tokens: int) -> None:
    if not page.get_by_label("System prompt", exact=True).is_visible():
        press_section(page, "System prompt and sampling")
    set_numbers(page, {"Max new tokens": tokens})


def send(page: Page, text: str) -> None:
    asked = page.locator("#chat .user.message").count()
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")
    # From here on the page shows Stop, until the answer has ended.
    page.locator("#chat .user.message").nth(asked).wait_for()


def ask(page: Page, text: str, tokens: int) -> None:
    set_longest(page, tokens)
    send(page, text)


def answer(page: Page) -> str:
    bubbles = page.locator("#chat .bot.message").all_inner_texts()
    return bubbles[-1].strip() if bubbles else ""


def wait_for_words(page: Page, length: int) -> None:
    """Wait until the last answer has grown to `length` characters; what it waits for ends in an ellipsis."""
    page.wait_for_function(
        """n => { const text = [...document.querySelectorAll('#chat .bot.message')].at(-1)?.innerText.trim();
                  return text?.length > n && !text.endsWith('…'); }""",
        arg=length,
        timeout=ANSWER_MS,
    )


def wait_for_end(page: Page) -> None:
    page.get_by_role("button", name="Send", exact=True).wait_for(timeout=ANSWER_MS)
    page.wait_for_function("[...document.querySelectorAll('#chat .bot.message')].at(-1)?.innerText.trim() !== '…'")
    before = None
    while before != (before := answer(page)):  # Markdown is rendered a little after the message arrived
        page.wait_for_timeout(200)
