"""Drives the page in a Chromium as a visitor would, for the measurements, the pictures and the tests."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Playwright

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
)
_TRIES = 20
_SETTLE_MS = 100.0


def launch(playwright: Playwright) -> Browser:
    """Start the system's Chromium, or else the one that Playwright installed, without a window.

    Raises:
        playwright.sync_api.Error: There is no Chromium.
    """
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return playwright.chromium.launch(executable_path=path, args=list(FLAGS))


def press_section(page: Page, name: str) -> None:
    """Open or close a section of the page, and wait until its controls have settled.

    Gradio draws a section when it opens, and a frame later sets each control to its first value again. Text that was
    typed in between is lost. A visitor is too slow for that; a script on a busy machine is not.
    """
    page.get_by_role("button", name=name).click()
    _settle(page)


def set_numbers(page: Page, values: Mapping[str, float]) -> None:
    """Type numbers into the sliders with these labels, and check that they stay.

    Raises:
        RuntimeError: A slider does not keep its number, for example because it is out of bounds.
    """
    boxes = {page.get_by_label(f"number input for {label}", exact=True): value for label, value in values.items()}
    for _ in range(_TRIES):
        for box, value in boxes.items():
            if box.input_value() != str(value):
                box.fill(str(value))
                box.press("Tab")
        _settle(page)
        if all(box.input_value() == str(value) for box, value in boxes.items()):
            return
    raise RuntimeError(f"The page does not keep {dict(values)}.")


def _settle(page: Page) -> None:
    page.wait_for_timeout(_SETTLE_MS)
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
