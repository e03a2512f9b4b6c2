"""Take screenshots of the running page: ``python -m demo.screenshots FOLDER [--url URL]``."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from playwright.sync_api import Browser

QUESTION = "Write a Python function that reverses a list, and explain it."
# The first answer may have to wait for the engine to start.
_ANSWER_MS = 120_000
_FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


class View(NamedTuple):
    """One kind of screen."""

    name: str
    width: int
    height: int
    scheme: Literal["light", "dark"]
    scale: float = 1.0


VIEWS = (
    View("desktop-light", 1280, 860, "light"),
    View("desktop-dark", 1280, 860, "dark"),
    View("phone-light", 390, 844, "light", 2.0),
    View("phone-dark", 390, 844, "dark", 2.0),
)


def take(browser: Browser, url: str, folder: Path, view: View) -> list[Path]:
    """Photograph one view three times: empty, while an answer is written, and after it."""
    context = browser.new_context(
        viewport={"width": view.width, "height": view.height},
        color_scheme=view.scheme,
        device_scale_factor=view.scale,
    )
    page = context.new_page()
    taken: list[Path] = []

    def shoot(moment: str) -> None:
        taken.append(folder / f"{view.name}-{moment}.png")
        page.screenshot(path=taken[-1], full_page=view.width < 640)

    page.goto(url)
    page.locator("#figures dl").wait_for()
    page.wait_for_timeout(1500)
    shoot("empty")
    page.get_by_label("Your message").fill(QUESTION)
    page.get_by_label("Your message").press("Enter")
    page.wait_for_function("document.querySelector('#chat .bot')?.innerText.length > 120", timeout=_ANSWER_MS)
    page.wait_for_timeout(1500)
    shoot("answering")
    page.locator("#send").wait_for(timeout=_ANSWER_MS)
    page.wait_for_timeout(1500)
    shoot("answered")
    context.close()
    return taken


def main(argv: Sequence[str] | None = None) -> int:
    """Photograph every view into a folder."""
    parser = argparse.ArgumentParser(prog="python -m demo.screenshots", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the PNG files go")
    parser.add_argument("--url", default="http://127.0.0.1:7860", help="the running page (default: %(default)s)")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)

    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The system's browser where there is one, else the one that Playwright installed.
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=list(_FLAGS))
        for view in VIEWS:
            for picture in take(browser, arguments.url, arguments.folder, view):
                print(picture)
        browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
