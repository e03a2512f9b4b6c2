"""What a visitor finds on the page, in a real browser: answers, the race, tables, the keyboard."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from support.demo import Served
from support.demo_page import answer, ask, wait_for_end

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


def seeds_of(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The seeds of all requests that come from now on."""
    seeds: list[int | None] = []
    submit = served.serving.manager.submit_request

    def noted(request):  # type: ignore[no-untyped-def]
        seeds.append(request.sampling.seed)
        return submit(request)

    monkeypatch.setattr(served.serving.manager, "submit_request", noted)
    return seeds


def test_retry_draws_another_answer(
    open_page: Callable[..., Page], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = seeds_of(served, monkeypatch)
    page = open_page()
    ask(page, "Tell me about the sea.", 16)
    wait_for_end(page)
    first = answer(page)
    page.get_by_role("button", name="Retry").click()
    page.wait_for_function(
        "old => ![...document.querySelectorAll('#chat .bot.message')].at(-1)?.innerText.includes(old)", arg=first
    )
    wait_for_end(page)
    assert answer(page) != first
    assert len(seeds) == 2
    assert seeds[0] != seeds[1], "the empty seed box means another seed each time"
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Retry").click()
    page.wait_for_timeout(300)
    wait_for_end(page)
    assert seeds[2] == 7
