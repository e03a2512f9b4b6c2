"""What the page says of chats that wait, and of a wall whose server goes away."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gradio as gr
import pytest
from support.demo import Served, wait_until_idle
from support.demo_page import ANSWER_MS, start_wall
from support.pace import held, slowed

from demo.app import build_app
from demo.page.style import launch_options
from demo.serving.backend import Backend
from demo.serving.serving import Serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


def counts(page: Page) -> dict[str, int]:
    """How many chats wait and run, as the wall's line, its tiles and the panel say."""
    told = page.locator(".wall .sum").inner_text()
    in_line = {
        word: int(found[1]) if (found := re.search(rf"(\d+) {word}", told)) else 0 for word in ("waiting", "running")
    }
    page.wait_for_function("document.querySelector('[data-f=waiting]').innerText")
    tiles = page.evaluate("[...document.querySelectorAll('.tile')].map(tile => tile.dataset.state)")
    return {
        "waiting in the line": in_line["waiting"],
        "waiting on tiles": tiles.count("waiting"),
        "waiting in the panel": int(page.locator("[data-f=waiting]").inner_text()),
        "running in the line": in_line["running"],
        "running on tiles": tiles.count("prefill") + tiles.count("decoding"),
        "running in the panel": int(page.locator("[data-f=running]").inner_text()),
    }


def test_waiting_is_counted_once_and_is_the_same_everywhere(open_page: Callable[..., Page], served: Served) -> None:
    page = open_page()
    with slowed(served.serving.manager, 0.05):
        start_wall(page, 24, 1000)
        page.wait_for_function("document.querySelectorAll('.tile[data-state=decoding]').length > 5", timeout=ANSWER_MS)
        page.wait_for_timeout(1500)  # until all that may begin has begun, and the panel has seen it
        with held(served.serving.manager):
            page.wait_for_timeout(1500)
            seen = counts(page)
    page.get_by_role("button", name="Stop all").click()
    waiting, running = ({value for name, value in seen.items() if name.startswith(kind)} for kind in ("wait", "run"))
    assert len(waiting) == len(running) == 1, seen
    assert sum(waiting) > 0, seen
    assert sum(waiting) + sum(running) == 24, seen


@contextmanager
def page_server(app: gr.Blocks, port: int) -> Iterator[None]:
    app.launch(server_name="127.0.0.1", server_port=port, quiet=True, prevent_thread_lock=True, **launch_options())
    try:
        yield
    finally:
        app.close(verbose=False)


def test_after_an_outage_the_page_says_what_became_of_the_wall(browser: Browser, serving: Serving) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The same page twice: another process would number its components alike, too.
    app = build_app(Backend(serving))
    page: Any = browser.new_page()
    page.set_default_timeout(ANSWER_MS)
    line = page.locator(".wall .sum")
    with slowed(serving.manager, 0.05):
        with page_server(app, port):
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_function("Number(document.querySelector('.panel')?.dataset.beats) > 0")
            start_wall(page, 3, 1000)
            grown = "[...document.querySelectorAll('.answer')].filter(e => e.innerText.length > 10).length === 3"
            page.wait_for_function(grown)
        line.get_by_text("The connection is lost").wait_for()
        written = page.locator(".tile .answer").all_inner_texts()
        with page_server(app, port):
            # Gradio loads the page anew once another server answers.
            line.get_by_text("the server has ended these chats").wait_for(state="attached")
            page.get_by_role("tab", name="Chat wall").click()
            assert page.locator(".tile .answer").all_inner_texts() == written
            assert page.locator(".tile[data-state=stopped]").count() == 3
            page.get_by_role("button", name=re.compile("^Start")).wait_for()
            page.reload()
            page.wait_for_function("Number(document.querySelector('.panel')?.dataset.beats) > 0")
            assert page.locator(".tile").count() == 0, "told once"
            page.close()
    wait_until_idle(serving)
