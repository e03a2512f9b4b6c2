"""The page in a real browser, on a real engine with a tiny model whose words mean nothing."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.demo import Served, wait_until_idle
from support.demo_page import (
    ANSWER_MS,
    answer,
    ask,
    send,
    set_longest,
    start_wall,
    wait_for_end,
    wait_for_wall,
    wait_for_words,
)
from support.pace import slowed

from demo.tools.browser import press_section

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

FIGURES = ("Running", "Waiting", "CPU busy", "MBU", "Step", "KV pages", "Prefix hits", "Requests")
# What moves on the page although it was not touched; the sum of its parts is the browser's own measure of jumps.
WATCH_SHIFTS = """() => { window.shifts = 0; new PerformanceObserver(list => {
  for (const entry of list.getEntries())
    // Within a tile, text moves up because there is more of it.
    if (!entry.hadRecentInput && entry.sources.some(({ node }) => node && !node.parentElement?.closest(".tile")))
      window.shifts += entry.value;
}).observe({ type: "layout-shift", buffered: BUFFERED }); }"""


def test_the_page_loads_with_live_figures_and_no_complaints(open_page: Callable[..., Page], served: Served) -> None:
    page = open_page()
    assert page.title() == "hf_async_batching"
    page.wait_for_function("document.querySelector('[data-facts]').innerText")
    facts = page.locator("[data-facts]").inner_text()
    assert "tiny (random)" in facts
    assert "CPU" in facts
    assert "float32" in facts
    assert tuple(page.locator(".panel dt").all_text_contents()) == FIGURES
    assert page.locator("[data-loading]").is_hidden()
    assert "384 KV pages" in str(page.locator("[data-f=pages]").get_attribute("title"))


# On a phone Gradio's own controls, which come one after the other, push what is below them.
@pytest.mark.parametrize(("width", "most"), [(1280, 0.1), (390, 0.25)])
def test_nothing_jumps_while_the_page_loads(open_page: Callable[..., Page], width: int, most: float) -> None:
    shifts = []
    for _ in range(3):  # on a busy machine parts of a page can come late: the best of three loads counts
        page = open_page(width=width)
        page.get_by_role("button", name="Run the race").wait_for()
        page.evaluate(WATCH_SHIFTS.replace("BUFFERED", "true"))
        page.wait_for_function("document.querySelector('.panel').dataset.beats > 3")
        shifts.append(page.evaluate("window.shifts"))
        if shifts[-1] < most:
            break
    assert min(shifts) < most, shifts


def test_everything_to_press_or_fill_has_a_name(open_page: Callable[..., Page]) -> None:
    page = open_page()
    for tab in ("Race", "Chat wall", "Dataset"):
        page.get_by_role("tab", name=tab).click()
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("button, input, textarea, a[href], canvas, [role=progressbar]")]
                .filter(e => e.offsetParent !== null)
                .filter(e => !e.ariaLabel && !e.title && !e.innerText.trim())
                .filter(e => ![...(e.labels ?? [])].some(label => label.innerText.trim()))
                .map(e => e.outerHTML.slice(0, 120))"""
        )
        assert nameless == [], tab


def rounded(page: Page) -> dict[str, int]:
    """Where the panel is, in whole pixels."""
    box = page.locator(".panel").bounding_box()
    assert box is not None
    return {name: round(value) for name, value in box.items()}


def test_an_answer_streams_while_the_figures_move(open_page: Callable[..., Page], served: Served) -> None:
    page = open_page()
    with slowed(served.serving.manager):
        ask(page, "Tell me a very long story about the sea.", 1000)
        wait_for_words(page, 8)
        early = answer(page)
        page.get_by_role("button", name="Stop", exact=True).wait_for()
        page.locator(".panel:not(.quiet)").wait_for()
        panel = rounded(page)
        page.wait_for_function("document.querySelector('[data-f=running]').innerText === '1'")
        page.wait_for_function("parseFloat(document.querySelector('[data-f=tokens_per_second]').innerText) > 1")
        page.get_by_role("button", name="Stop", exact=True).click()
        wait_for_end(page)
    assert len(answer(page)) > len(early)
    assert re.search(r"\d+ tokens · first after [\d.]+ s · [\d.]+ tokens/s", page.locator("#note").inner_text())
    assert rounded(page) == panel, "the panel must not move when figures change"


def test_stop_keeps_the_text_and_frees_the_row(open_page: Callable[..., Page], served: Served) -> None:
    page = open_page()
    with slowed(served.serving.manager):
        ask(page, "Tell me a very long story about the sea.", 1000)
        wait_for_words(page, 20)
        page.get_by_role("button", name="Stop", exact=True).click()
        wait_for_end(page)
    wait_until_idle(served.serving)
    assert served.serving.manager.stats().running == 0
    assert served.serving.manager.stats().pages_in_use == 0
    assert len(answer(page)) > 20
    assert "stopped" in page.locator("#note").inner_text()


def test_a_closed_tab_frees_its_row(open_page: Callable[..., Page], served: Served) -> None:
    page = open_page()
    ask(page, "Tell me a very long story about the sea.", 1000)
    wait_for_words(page, 20)
    page.context.close()
    wait_until_idle(served.serving)


def test_two_visitors_share_the_batch(open_page: Callable[..., Page], served: Served) -> None:
    pages = [open_page(), open_page()]
    for page in pages:
        set_longest(page, 1000)
    manager = served.serving.manager
    with slowed(manager, 0.02):
        for _ in range(5):
            for page in pages:
                send(page, "Tell me a long story.")
            for page in pages:
                wait_for_words(page, 10)
            if manager.stats().running == 2:
                break
            # A drawn answer can end by itself; the next ones are drawn anew.
            for page in pages:
                stop = page.get_by_role("button", name="Stop", exact=True)
                if stop.is_visible():
                    stop.click()
                wait_for_end(page)
        assert manager.stats().running == 2
        pages[0].get_by_role("button", name="Stop", exact=True).click()
        wait_for_end(pages[0])
        assert manager.stats().running == 1, "one visitor's Stop must not end another's answer"


def test_markup_from_users_is_shown_as_text(open_page: Callable[..., Page]) -> None:
    page = open_page()
    text = "<script>window.pwned = 1</script> <img src=x onerror='window.pwned = 1'> <b>bold</b>"
    ask(page, text, 8)
    wait_for_end(page)
    assert page.locator("#chat .user.message").inner_text().strip() == text
    assert page.evaluate("window.pwned") is None


def test_an_over_long_prompt_is_answered_in_the_chat(open_page: Callable[..., Page]) -> None:
    page = open_page()
    ask(page, "7" * 19_000, 16)
    wait_for_end(page)
    assert "too long" in answer(page)
    ask(page, "Hi", 8)
    page.locator("#note p", has_text="tokens").wait_for(timeout=ANSWER_MS)


def test_retry_undo_and_clear(open_page: Callable[..., Page], served: Served) -> None:
    page = open_page()
    press_section(page, "System prompt and sampling")
    page.get_by_label("Greedy", exact=False).last.check()
    page.wait_for_function("document.querySelectorAll('.knobs input[type=range]:disabled').length === 3")
    ask(page, "What is the capital of France?", 16)
    wait_for_end(page)
    first = answer(page)
    # The button that ends an answer can come and go faster than it is seen.
    finished = served.serving.manager.stats().finished
    page.get_by_role("button", name="Retry").click()
    deadline = time.monotonic() + ANSWER_MS / 1000
    while served.serving.manager.stats().finished == finished:
        assert time.monotonic() < deadline, "nothing was generated anew"
        page.wait_for_timeout(20)
    wait_for_end(page)
    assert answer(page) == first
    assert page.locator("#chat .bot.message").count() == 1
    page.get_by_role("button", name="Undo").last.click()
    page.locator("#chat .message").first.wait_for(state="detached")
    assert page.get_by_label("Your message").input_value() == "What is the capital of France?"
    # Still being written when it is cleared: Gradio can send the last page of an answer that has ended once more.
    with slowed(served.serving.manager, 0.02):
        ask(page, "Tell me a very long story.", 1000)
        wait_for_words(page, 10)
        page.get_by_role("button", name="Clear").click()
        wait_for_end(page)
        page.get_by_role("button", name="Select example 1").wait_for()


def test_an_example_is_asked_when_clicked(open_page: Callable[..., Page], served: Served) -> None:
    page = open_page()
    with slowed(served.serving.manager, 0.05):
        page.get_by_role("button", name="Select example 1").click()
        wait_for_words(page, 10)
        assert page.locator("#chat .user.message").inner_text().startswith("What is the capital")
        page.get_by_role("button", name="Stop", exact=True).click()
        wait_for_end(page)


def test_an_edited_question_is_answered_anew(open_page: Callable[..., Page]) -> None:
    page = open_page()
    ask(page, "What is the capital of France?", 8)
    wait_for_end(page)
    page.locator("#chat .user").first.hover()
    page.get_by_role("button", name="Edit").click()
    page.locator("#chat textarea").fill("What is the capital of Norway?")
    page.get_by_role("button", name="Submit").click()
    page.locator("#chat .user.message", has_text="Norway").wait_for()
    wait_for_end(page)
    assert page.locator("#chat .bot.message").count() == 1


def test_a_reload_keeps_the_conversation_and_ends_what_was_running(
    open_page: Callable[..., Page], served: Served
) -> None:
    page = open_page()
    ask(page, "Remember me.", 8)
    wait_for_end(page)
    kept = answer(page)
    start_wall(page, 4, 1000)
    # What the page was still receiving is cut off, of which Gradio's own script complains while it goes.
    open_page.forgiven += ("signal is aborted", "Connection errored out")  # type: ignore[attr-defined]
    page.reload()
    page.locator("#chat .user.message", has_text="Remember me.").wait_for()
    page.wait_for_function("document.querySelectorAll('#chat .bot.message').length === 1")
    assert answer(page) == kept
    wait_until_idle(served.serving)
    assert page.locator(".tile").count() == 0
    other = open_page()
    other.get_by_role("button", name="Select example 1").wait_for()
    assert other.locator("#chat .user.message").count() == 0, "another browser sees nothing of it"


def test_sixteen_chats_run_to_their_ends(open_page: Callable[..., Page], served: Served) -> None:
    page = open_page()
    page.evaluate(WATCH_SHIFTS.replace("BUFFERED", "false"))
    start_wall(page, 16, 60, turns=2)
    wait_for_wall(page)
    assert page.locator(".tile[data-state=done]").count() == 16
    # Now and then a word means the end.
    assert re.match(r"16 chats · 16 done · 1,[89]\d\d tokens", page.locator(".wall .sum").inner_text())
    for tile in page.locator(".tile").all()[:3]:
        assert re.search(r"^[\d.]+$", tile.locator(".speed").text_content() or "")
        assert re.search(r"^\d+\.\d\d s$", tile.locator(".first").text_content() or "")
        assert len(tile.locator(".answer").all_inner_texts()) == 2
    assert page.evaluate("window.shifts") < 0.05, "the page jumps"
    wait_until_idle(served.serving)


def test_a_wall_is_drawn_ten_times_a_second_and_chats_join_and_leave(
    open_page: Callable[..., Page], served: Served
) -> None:
    page = open_page()
    with slowed(served.serving.manager):
        start_wall(page, 8, 1000)
        page.wait_for_function("Number(document.querySelector('.wall').dataset.fps) >= 10")
        page.get_by_role("button", name="Add 4").click()
        page.wait_for_function("document.querySelectorAll('.tile').length === 12")
        page.get_by_role("button", name="Stop chat 2", exact=True).click()
        page.locator(".tile[data-state=stopped]").wait_for()
        page.locator(".tile[data-state=decoding]").nth(3).wait_for()
        page.get_by_role("button", name="Stop all").click()
        wait_for_wall(page)
    # Now and then a word means the end.
    stopped, done = (page.locator(f".tile[data-state={state}]").count() for state in ("stopped", "done"))
    assert stopped + done == 12
    assert stopped > 6


def test_prompts_of_the_wall_are_text_and_too_long_ones_say_so(open_page: Callable[..., Page]) -> None:
    page = open_page()
    attack = "<img src=x onerror='window.pwned = 1'><script>window.pwned = 1</script>"
    start_wall(page, 2, 8, prompts=f"{attack}\n{'7' * 19_000}")
    wait_for_wall(page)
    assert page.locator(".tile .question").first.text_content() == attack
    assert page.evaluate("window.pwned") is None
    assert "too long" in page.locator(".tile[data-state=failed] .problem").inner_text()
    assert page.locator(".tile[data-state=done]").count() == 1


def test_a_closed_tab_frees_its_wall(open_page: Callable[..., Page], served: Served) -> None:
    page = open_page()
    start_wall(page, 20, 1000)
    page.locator(".tile[data-state=decoding]").first.wait_for()
    page.context.close()
    wait_until_idle(served.serving)


def test_the_timeline_is_explained_and_its_trace_can_be_taken_home(
    open_page: Callable[..., Page], tmp_path: Path
) -> None:
    page = open_page()
    ask(page, "Hi", 30)
    wait_for_end(page)
    page.wait_for_function("document.querySelector('.panel').dataset.beats > 4")
    lanes, tip = page.locator(".panel [data-lanes]"), page.locator(".panel [data-tip]")
    box = lanes.bounding_box()
    assert box is not None
    for part in (0.6, 0.55, 0.65, 0.5, 0.7, 0.45, 0.75, 0.4, 0.8):  # where a step was not just waited for
        lanes.hover(position={"x": box["width"] * part, "y": box["height"] * 0.5})
        page.wait_for_timeout(300)
        if "decode" in tip.inner_text():
            break
    assert re.match(r"Step \d+ · compute · .+ · [\d.]+ (µs|ms) · \d+ rows decode", tip.inner_text())
    with page.expect_download() as download:
        page.get_by_role("button", name="Download trace").click()
    download.value.save_as(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    lanes_named = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert lanes_named == {"host", "h2d", "compute", "d2h"}
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events if event["ph"] == "X")


def test_a_dataset_is_uploaded_completed_and_downloaded(open_page: Callable[..., Page], tmp_path: Path) -> None:
    page = open_page()
    page.get_by_role("tab", name="Dataset").click()
    path = tmp_path / "mine.csv"
    path.write_text("id,ask\n" + "".join(f"{i},Question {i}?\n" for i in range(25)))
    page.locator("#upload input[type=file]").set_input_files(path)
    page.locator("#about", has_text="25 rows.").wait_for()
    page.locator("#about", has_text="Question 0?").wait_for()
    page.get_by_role("button", name="Complete all rows").click()
    page.locator("#progress", has_text="25 of 25 rows").wait_for(timeout=ANSWER_MS)
    page.locator("#progress", has_text="done in").wait_for(timeout=ANSWER_MS)
    with page.expect_download() as download:
        page.locator("#download").click()
    download.value.save_as(tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["ask"] for row in rows] == [f"Question {i}?" for i in range(25)]
    assert all(row["completion"] for row in rows)


def test_a_broken_upload_is_told_on_the_page(open_page: Callable[..., Page], tmp_path: Path) -> None:
    page = open_page()
    page.get_by_role("tab", name="Dataset").click()
    path = tmp_path / "broken.jsonl"
    path.write_text("<script>window.pwned = 1</script>")
    page.locator("#upload input[type=file]").set_input_files(path)
    page.locator("#about [role=alert]", has_text="cannot be read").wait_for()
    assert page.evaluate("window.pwned") is None


def test_a_phone_shows_64_chats_without_sideways_scroll(open_page: Callable[..., Page], served: Served) -> None:
    page = open_page(width=390, height=844)
    assert page.evaluate("scrollY") == 0, "the page must open at its top"
    with slowed(served.serving.manager, 0.05):
        start_wall(page, 64, 1000, turns=1)
        page.locator(".tile[data-state=decoding]").first.wait_for()
        page.get_by_role("tab", name="Your chat").click()
        ask(page, f"Explain {'x' * 120}\n```python\nprint('{'x' * 200}')\n```", 8)
        page.get_by_role("tab", name="Chat wall").click()
        page.get_by_role("button", name="Stop all").click()
        wait_for_wall(page)
    wait_for_end(page)
    for tab in ("Race", "Dataset", "Chat wall"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
    hidden = "[...document.querySelectorAll('.panel dt')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert page.evaluate(hidden) == 0, "no label of the figures may be cut off"


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
          const looked = ["#top h1", "#top p", "[data-facts] b", ".panel dt", ".panel dd", ".panel .tip",
            "#send", ".race .sum"];
          for (const s of looked) {
            const e = document.querySelector(s), a = light(parse(getComputedStyle(e).color)), b = light(ground(e));
            result[s] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          }
          return result; }"""
    )
    assert {name: ratio for name, ratio in contrasts.items() if ratio < 4.5} == {}
