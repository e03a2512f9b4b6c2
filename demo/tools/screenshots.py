"""Take the pictures of docs/ from the running page: ``python -m demo.tools.screenshots FOLDER [--url URL]``."""

from __future__ import annotations

import argparse
import io
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .browser import launch, press_section, set_numbers

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

QUESTION = "Write a Python function that reverses a list, and explain it."
# A page has few colours: 256 of them look the same, and a picture takes a third of the bytes.
_COLOURS = 256
# The film of the wall: at most so many bytes, so wide, so long, so often.
_LARGEST_FILM = 2_400_000
_FILM_WIDTH = 960
_FILM_SECONDS = 9.0
_FILM_STEP_SECONDS = 0.18
_FILM_REST_MS = 2500
_QUALITIES = (80, 65, 50, 35, 20)


class View(NamedTuple):
    """One kind of screen, and what is photographed there."""

    name: str
    width: int
    height: int
    scheme: Literal["light", "dark"]
    chats: int
    scale: float = 1.0
    race: bool = False


VIEWS = (
    View("desktop-light", 1280, 1400, "light", 16, race=True),
    View("desktop-dark", 1280, 1400, "dark", 16),
    View("phone-light", 390, 844, "light", 16, 2.0),
    View("phone-dark", 390, 844, "dark", 64, 2.0),
)
FILM = View("film", 1280, 1000, "light", 30)
_STARTED = "document.querySelector('[data-loading]')?.hidden && document.querySelector('[data-facts] b')"
_HALF = "[...document.querySelectorAll('.answer')].filter(e => e.innerText.length > 60).length > n / 2"


class Photographer:
    """Takes pictures of one page, and goes on where one of them cannot be had.

    Args:
        browser: A Chromium.
        url: The running page.
        folder: Where the pictures go.
        patience: The most seconds that one wait takes. After them the picture is taken of what is there.
    """

    def __init__(self, browser: Browser, url: str, folder: Path, patience: float) -> None:
        self.browser, self.url, self.folder, self.patience = browser, url, folder, patience
        self.problems: list[str] = []

    def take(self, view: View) -> Iterator[Path]:
        """Photograph one view: the wall, on a desktop beside a chat, and the race where the view asks for it."""
        with self._open(view) as page:
            desktop = view.width > 640
            self._start_wall(page, view.chats)
            if desktop:
                self._ask(page)
                self._wait(page, view, "an answer", "document.querySelector('#chat .bot')?.innerText.length > 300")
            self._wait(page, view, "half of the wall", f"n => {_HALF}", view.chats)
            page.evaluate("scrollTo(0, 0)")
            if not desktop:
                yield self._shoot(page, f"{view.name}-top")
                page.evaluate("document.querySelector('#walls').scrollIntoView()")
            yield self._shoot(page, f"{view.name}-wall")
            if not view.race:
                return
            _stop_all(page)
            page.get_by_role("tab", name="Race").click()
            page.get_by_role("button", name="Run the race").click()
            self._wait(page, view, "the end of the race", "document.querySelector('.race').dataset.over === 'true'")
            page.wait_for_timeout(500)  # the bars fade
            yield self._shoot(page, f"{view.name}-race")

    def film(self, view: View) -> Iterator[Path]:
        """Film a wall and a chat beside it from their start, at the speed at which they run."""
        with self._open(view) as page:
            page.get_by_role("tab", name="Chat wall").click()
            press_section(page, "Prompts and settings")
            set_numbers(page, {"Questions per chat": 3, "Max new tokens per answer": 256})
            press_section(page, "Prompts and settings")
            page.evaluate("document.querySelector('#columns').scrollIntoView()")
            self._start_wall(page, view.chats)
            self._ask(page)
            shots: list[bytes] = []
            times: list[float] = []
            begin = time.monotonic()
            while (now := time.monotonic() - begin) < _FILM_SECONDS:
                shots.append(page.screenshot(type="png"))
                times.append(now)
                if page.evaluate("document.querySelector('.wall').dataset.over === 'true'"):
                    break
                page.wait_for_timeout(max(0.0, _FILM_STEP_SECONDS - (time.monotonic() - begin - now)) * 1000)
        path = self.folder / "demo-wall.webp"
        save_film(shots, times, path)
        yield path

    @contextmanager
    def _open(self, view: View) -> Iterator[Page]:
        context = self.browser.new_context(
            viewport={"width": view.width, "height": view.height},
            color_scheme=view.scheme,
            device_scale_factor=view.scale,
        )
        try:
            page = context.new_page()
            page.set_default_timeout(1000 * self.patience)
            page.goto(self.url)
            self._wait(page, view, "the engine", _STARTED)  # until everything is loaded and compiled
            page.get_by_role("tab", name="Chat wall").click()
            yield page
        finally:
            context.close()

    def _start_wall(self, page: Page, chats: int) -> None:
        set_numbers(page, {"Chats at once": chats})
        page.get_by_role("button", name=re.compile("^Start")).click()

    def _ask(self, page: Page) -> None:
        page.get_by_label("Your message").fill(QUESTION)
        page.get_by_label("Your message").press("Enter")

    def _wait(self, page: Page, view: View, what: str, condition: str, arg: Any = None) -> None:
        from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

        try:
            page.wait_for_function(condition, arg=arg)
        except PlaywrightTimeoutError:
            self.problems.append(f"{view.name}: {what} did not come within {self.patience:g} s")

    def _shoot(self, page: Page, name: str) -> Path:
        path = self.folder / f"demo-{name}.png"
        from PIL import Image

        shot = Image.open(io.BytesIO(page.screenshot(type="png"))).convert("RGB")
        shot.quantize(_COLOURS).save(path, optimize=True)
        return path


def save_film(shots: Sequence[bytes], times: Sequence[float], path: Path) -> None:
    """Save screenshots as one animated picture that is small enough for a README.

    Args:
        shots: PNG files, in order.
        times: When each was taken, in seconds.
        path: A WebP file.
    """
    from PIL import Image

    frames = []
    for shot in shots:
        frame = Image.open(io.BytesIO(shot)).convert("RGB")
        height = round(frame.height * _FILM_WIDTH / frame.width)
        frames.append(frame.resize((_FILM_WIDTH, height), Image.Resampling.LANCZOS))
    lasts = [max(1, round(1000 * (after - before))) for before, after in pairwise(times)]
    lasts.append(_FILM_REST_MS)
    for quality in _QUALITIES:
        frames[0].save(
            path, save_all=True, append_images=frames[1:], duration=lasts, loop=0, quality=quality, method=4
        )
        if path.stat().st_size <= _LARGEST_FILM:
            return


def _stop_all(page: Page) -> None:
    """Stop the wall and the chat where they are not over: a race beside them has no verdict."""
    for stop, idle in (("Stop all", re.compile("^Start")), ("Stop", "Send")):
        button = page.get_by_role("button", name=stop, exact=True)
        if button.is_visible():
            button.click()
        page.get_by_role("button", name=idle).wait_for()


def main(argv: Sequence[str] | None = None) -> int:
    """Photograph every view into a folder. Returns 1 where a picture is missing or a wait was in vain."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.tools.screenshots", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--url", default="http://127.0.0.1:7860", help="the running page (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="some views only, such as phone-dark or film")
    parser.add_argument("--patience", type=float, default=300, help="most seconds of one wait (default: %(default)s)")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)

    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = launch(playwright)
        photographer = Photographer(browser, arguments.url, arguments.folder, arguments.patience)
        ways: list[tuple[View, Callable[[View], Iterator[Path]]]] = [(view, photographer.take) for view in VIEWS]
        ways.append((FILM, photographer.film))
        for view, way in ways:
            if arguments.only and view.name not in arguments.only:
                continue
            try:
                for picture in way(view):
                    print(picture, flush=True)
            except Exception as error:  # the other views may still succeed
                photographer.problems.append(f"{view.name}: {error}")
        browser.close()
    print(*photographer.problems, sep="\n", file=sys.stderr)
    return 1 if photographer.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
