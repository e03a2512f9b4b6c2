"""Take the pictures of docs/ from the running page: ``python -m demo.tools.screenshots FOLDER [--url URL]``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from .browser import launch, set_numbers

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

QUESTION = "Write a Python function that reverses a list, and explain it."
# The first answer may have to wait for the engine to start.
_WAIT_MS = 300_000
# Where a picture is worth more bytes than this, it becomes a JPEG.
_LARGEST_PNG = 250_000


class View(NamedTuple):
    """One kind of screen."""

    name: str
    width: int
    height: int
    scheme: Literal["light", "dark"]
    chats: int
    scale: float = 1.0


VIEWS = (
    View("desktop-light", 1280, 1240, "light", 16),
    View("desktop-dark", 1280, 1240, "dark", 16),
    View("phone-light", 390, 844, "light", 16, 2.0),
    View("phone-dark", 390, 844, "dark", 64, 2.0),
)


def take(browser: Browser, url: str, folder: Path, view: View) -> list[Path]:
    """Photograph one view: a wall beside a chat, and on a desktop the comparison too."""
    context = browser.new_context(
        viewport={"width": view.width, "height": view.height},
        color_scheme=view.scheme,
        device_scale_factor=view.scale,
    )
    page = context.new_page()
    page.set_default_timeout(_WAIT_MS)
    page.goto(url)
    # Until everything is loaded and compiled.
    page.wait_for_function(
        "document.querySelector('[data-loading]')?.hidden && document.querySelector('[data-facts] b')"
    )
    desktop = view.width > 640
    page.get_by_role("tab", name="Chat wall").click()
    set_numbers(page, {"Chats at once": view.chats})
    page.get_by_role("button", name=re.compile("^Start")).click()
    if desktop:
        page.get_by_label("Your message").fill(QUESTION)
        page.get_by_label("Your message").press("Enter")
        page.wait_for_function("document.querySelector('#chat .bot')?.innerText.length > 300")
        page.evaluate("scrollTo(0, 0)")
    half = "[...document.querySelectorAll('.answer')].filter(e => e.innerText.length > 60).length > n / 2"
    page.wait_for_function(f"n => {half}", arg=view.chats)
    taken = []
    if not desktop:
        taken.append(_shoot(page, folder, f"{view.name}-top"))
        page.evaluate("document.querySelector('#walls').scrollIntoView()")
    taken.append(_shoot(page, folder, f"{view.name}-wall"))
    page.get_by_role("button", name="Stop all").click()
    page.get_by_role("button", name=re.compile("^Start")).wait_for()
    if desktop:
        page.get_by_role("tab", name="Race").click()
        page.get_by_role("button", name="Run the race").click()
        page.wait_for_function("document.querySelector('.race').dataset.over === 'true'")
        page.wait_for_timeout(500)  # the bars fade
        taken.append(_shoot(page, folder, f"{view.name}-race"))
    context.close()
    return taken


def _shoot(page: Page, folder: Path, name: str) -> Path:
    path = folder / f"demo-{name}.png"
    page.screenshot(path=path)
    from PIL import Image

    # A page has few colours: 256 of them look the same and take a third of the bytes.
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
    if path.stat().st_size > _LARGEST_PNG:
        path.unlink()
        path = folder / f"demo-{name}.jpg"
        page.screenshot(path=path, type="jpeg", quality=82)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Photograph every view into a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.tools.screenshots", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--url", default="http://127.0.0.1:7860", help="the running page (default: %(default)s)")
    parser.add_argument("--only", help="one view only, such as phone-dark")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)

    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = launch(playwright)
        for view in VIEWS:
            if arguments.only in (None, view.name):
                for picture in take(browser, arguments.url, arguments.folder, view):
                    print(picture)
        browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
