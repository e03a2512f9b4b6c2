"""What a visitor finds on the page, in a real browser: answers, the race, tables, the keyboard."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.demo import Served
from support.demo_page import ANSWER_MS, answer, ask, send, start_wall, wait_for_end, wait_for_wall, wait_for_words
from support.pace import slowed

from demo.tools.browser import set_numbers

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


def test_a_race_ends_with_one_ratio_and_can_be_taken_home(open_page: Callable[..., Page], served: Served) -> None:
    page = open_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    set_numbers(page, {"Questions": 4, "Longest answer": 16})
    page.get_by_role("button", name="Run the race").click()
    page.wait_for_function("document.querySelector('.race').dataset.over === 'true'")
    lanes = page.locator(".race .took").all_inner_texts()
    assert len(lanes) == 4
    assert all(re.match(r"[\d.]+ s · [\d,.]+ tokens/s$", lane) for lane in lanes), lanes
    told = page.locator("[data-told]").inner_text()
    assert "On a CPU nothing overlaps" in told
    assert "The same words in all four ways: 4 of 4 answers." in told
    assert served.serving.manager.stats().depth == served.serving.depth
    if page.locator("[data-copy]").is_visible():  # not where all ways are alike within the noise
        page.get_by_role("button", name="Copy as picture").click()
        page.locator("[data-copied]", has_text=re.compile("Copied|Downloaded")).wait_for()
    page.get_by_text("Sync and async, step by step").click()
    cells = page.locator(".compare tbody tr").first.locator("td").all_inner_texts()
    assert all(re.search(r"\d", cell) for cell in cells), cells
    page.locator("[data-lanes='2']").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".compare [data-tip]").inner_text().startswith("Step ")
    page.reload()
    page.locator("[data-told]", has_text="The same words").wait_for()
    assert page.locator(".race .took").all_inner_texts() == lanes, "the outcome is kept"


def test_a_race_has_no_verdict_where_it_would_not_be_true(open_page: Callable[..., Page]) -> None:
    page = open_page()

    def verdict(speeds: tuple[float, ...], gpu: bool = True, others: int = 0, stopped: bool = False) -> dict[str, str]:
        outcomes = {
            way: {"tokens_per_second": speed, "others": others, "gpu": gpu, "chats": 8}
            for way, speed in zip(("one", "padded", "1", "2"), speeds)
        }
        result: dict[str, str] = page.evaluate(
            "([outcomes, state]) => hfab.verdict(outcomes, state)", [outcomes, {"same": 8, "stopped": stopped}]
        )
        return result

    clear = verdict((10, 20, 40, 60))
    assert clear["ratio"] == 6
    assert "3.0\u00d7 the speed of a padded batch" in clear["told"]
    assert "Async is 50 % faster than sync." in clear["told"]
    assert verdict((10, 20, 40, 60), others=1)["ratio"] is None
    assert "no verdict" in verdict((10, 20, 40, 60), others=1)["told"]
    assert verdict((10, 20, 40, 60), stopped=True)["ratio"] is None
    close = verdict((10, 10.1, 10.2, 10.3))
    assert close["ratio"] is None
    assert "No difference to one by one beyond the noise." in close["told"]
    assert "No difference between sync and async beyond the noise." in close["told"]
    assert "faster" not in verdict((10, 20, 40, 60), gpu=False)["told"]


def test_the_first_screen_says_what_this_is_and_starts_a_wall(open_page: Callable[..., Page], served: Served) -> None:
    for width, height in ((1280, 800), (390, 844)):
        page = open_page(width, height)
        show = page.get_by_role("button", name="Watch 16 chats at once")
        for seen in (show, page.get_by_label("Your message"), page.get_by_role("link", name="Repository")):
            box = seen.bounding_box()
            assert box is not None and box["y"] + box["height"] <= height
        assert "tiny (random)" in page.locator("[data-model]").inner_text()
        assert page.locator(".panel .top").is_hidden(), "no wall of zeros while nothing runs"
        page.get_by_role("tab", name="Your chat").wait_for(state="visible" if width == 390 else "hidden")
    send(page, "Hi")  # on the phone the chat's own tab opens
    page.locator("#chat .user.message").wait_for()
    wait_for_end(page)
    with slowed(served.serving.manager, 0.05):
        show.click()
        page.wait_for_function("document.querySelectorAll('.tile').length > 1")
        page.get_by_role("button", name="Stop all").click()
        wait_for_wall(page)


def test_a_reload_keeps_a_question_and_what_was_answered(open_page: Callable[..., Page], served: Served) -> None:
    page = open_page()
    with slowed(served.serving.manager, 0.03):
        ask(page, "Tell me a very long story.", 1000)
        wait_for_words(page, 8)
        page.wait_for_timeout(3000)  # the browser keeps the answer about once a second
        early = answer(page)[:8]
        open_page.forgiven += ("signal is aborted", "Connection errored out")  # type: ignore[attr-defined]
        page.reload()
        page.locator("#chat .bot.message", has_text="The page was left before this answer was complete").wait_for()
    assert page.locator("#chat .user.message").inner_text().strip() == "Tell me a very long story."
    assert answer(page).startswith(early)


def test_a_chat_of_the_wall_opens_and_the_wall_is_one_stop_of_the_keyboard(
    open_page: Callable[..., Page], served: Served
) -> None:
    page = open_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    start_wall(page, 6, 24, prompts="Hello, wall.")
    wait_for_wall(page)
    stops = "[...document.querySelectorAll('.tile button:enabled')].filter(e => e.tabIndex === 0).length"
    assert page.evaluate(stops) == 1
    page.locator(".tile .open").first.focus()
    page.keyboard.press("ArrowRight")
    outline = "getComputedStyle(document.activeElement.closest('.tile')).outlineStyle"
    assert page.evaluate(outline) == "solid", "the focus is seen"
    page.keyboard.press("Enter")
    assert page.locator("dialog h2").inner_text() == "Chat 2"
    assert page.locator("dialog h3").inner_text() == "Hello, wall."
    whole = page.locator("dialog p").inner_text()
    assert whole.split() == (page.locator(".tile .answer").nth(1).text_content() or "").split()
    page.get_by_role("button", name="Copy", exact=True).click()
    page.locator("dialog [data-said]", has_text="Copied.").wait_for()
    assert whole in page.evaluate("navigator.clipboard.readText()")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.innerText") == "2"
    # As after an outage in which the server has forgotten the wall.
    page.evaluate("document.querySelector('.wall').dataset.over = 'false'")
    page.evaluate("document.dispatchEvent(new Event('hfab:back'))")
    page.locator(".wall .sum", has_text="The connection was lost").wait_for()
    page.get_by_role("button", name="Start 6 chats").wait_for()


def test_a_table_shows_its_rows_while_they_are_completed(
    open_page: Callable[..., Page], served: Served, tmp_path: Path
) -> None:
    page = open_page()
    page.get_by_role("tab", name="Dataset").click()
    path = tmp_path / "mine.csv"
    path.write_text("id,ask\n" + "".join(f"{i},Question {i}?\n" for i in range(40)))
    page.locator("#upload input[type=file]").set_input_files(path)
    page.locator("#about", has_text="from the column ask").wait_for()
    with slowed(served.serving.manager, 0.02):
        page.get_by_role("button", name="Complete all rows").click()
        page.locator(".rows tbody tr").first.wait_for(timeout=ANSWER_MS)
        page.get_by_role("button", name="Stop rows").click()
        page.locator("#progress", has_text="stopped").wait_for()
    number, prompt, completion = page.locator(".rows tbody tr").last.locator("th, td").all_inner_texts()
    assert prompt == f"Question {int(number) - 1}?"
    assert completion
    with page.expect_download() as download:
        page.locator("#download", has_text="Download what is done").click()
    download.value.save_as(tmp_path / "part.jsonl")
    assert 0 < len((tmp_path / "part.jsonl").read_text().splitlines()) < 40
    page.get_by_role("button", name="Resume").click()
    page.locator("#progress", has_text="done in").wait_for(timeout=ANSWER_MS)
    assert "stopped" not in page.locator("#progress").inner_text()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_axe_finds_nothing_serious(open_page: Callable[..., Page], served: Served, width: int, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.base")
    page = open_page(width, 844, scheme)
    page.evaluate(axe.AXE_SCRIPT)
    # A wall that ends by itself changes its buttons, some of them while they are looked at.
    with slowed(served.serving.manager, 0.3):
        for tab in ("Race", "Chat wall", "Dataset", *(("Your chat",) if width == 390 else ())):
            page.get_by_role("tab", name=tab).click()
            if tab == "Chat wall":
                page.get_by_role("button", name="Start 16 chats").click()
                page.locator(".tile[data-state=decoding]").first.wait_for()
            # The list of example questions is Gradio's own.
            found = page.evaluate(
                """async () => {
                    // A button that has just become usable still fades in: half of a colour has half of its contrast.
                    const ends = a => a.effect.getComputedTiming().endTime !== Infinity;
                    const running = document.getAnimations().filter(ends).map(a => a.finished.catch(() => null));
                    await Promise.race([Promise.all(running), new Promise(done => setTimeout(done, 5000))]);
                    return (await axe.run({ exclude: ["#chat .examples"] })).violations
                        .filter(v => ["serious", "critical"].includes(v.impact))
                        .map(v => [v.id, v.nodes.map(node => node.html.slice(0, 120))]);
                }"""
            )
            assert found == [], tab
            if tab == "Chat wall":
                page.get_by_role("button", name="Stop all").click()
                wait_for_wall(page)
