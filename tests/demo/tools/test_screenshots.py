"""The tool that takes the pictures of docs/: what it writes, and that one failure costs no other picture."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from demo.tools import screenshots
from demo.tools.screenshots import FILM, VIEWS, Photographer, View, main, save_film

DOCS = Path(__file__).parents[3] / "docs"


def shot(shade: int, size: tuple[int, int] = (640, 400)) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 90).point(lambda value: (value + shade) % 256).convert("RGB").save(file, "PNG")
    return file.getvalue()


def test_a_film_runs_at_the_speed_of_the_page_and_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screenshots, "_FILM_WIDTH", 320)
    shots, times = [shot(50 * number) for number in range(3)], [0.0, 0.2, 0.5]
    save_film(shots, times, tmp_path / "free.webp")
    with Image.open(tmp_path / "free.webp") as film:
        assert (film.n_frames, film.size) == (3, (320, 200))  # type: ignore[attr-defined]
        lasts = []
        for number in range(3):
            film.seek(number)
            film.load()
            lasts.append(film.info["duration"])
    assert lasts == [200, 300, screenshots._FILM_REST_MS]
    free = (tmp_path / "free.webp").stat().st_size
    monkeypatch.setattr(screenshots, "_LARGEST_FILM", free - 1)
    save_film(shots, times, tmp_path / "small.webp")
    assert (tmp_path / "small.webp").stat().st_size < free


def test_the_pictures_have_the_names_that_docs_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Page:
        url = "page"

        def screenshot(self, **_: Any) -> bytes:
            return shot(0, (64, 40))

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: self

    @contextmanager
    def opened(self: Photographer, view: View) -> Iterator[Any]:
        yield Page()

    monkeypatch.setattr(Photographer, "_open", opened)
    monkeypatch.setattr(Photographer, "_start_wall", lambda *_: None)
    photographer = Photographer(None, "", tmp_path, 1.0)  # type: ignore[arg-type]
    taken = [picture.name for view in VIEWS for picture in photographer.take(view)]
    assert sorted(taken) == sorted(path.name for path in DOCS.glob("demo-*.png"))
    assert not photographer.problems


@pytest.mark.browser
def test_a_page_that_does_not_come_costs_no_other_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("playwright")
    tried = []

    def take(self: Photographer, view: View) -> Iterator[Path]:
        tried.append(view.name)
        if view.name == "desktop-light":
            raise RuntimeError("no such page")
        yield self.folder / view.name

    monkeypatch.setattr(Photographer, "take", take)
    monkeypatch.setattr(Photographer, "film", take)
    monkeypatch.setattr(screenshots, "launch", lambda _: type("Browser", (), {"close": lambda self: None})())
    assert main([str(tmp_path)]) == 1
    assert tried == [*(view.name for view in VIEWS), FILM.name]
    said = capsys.readouterr()
    assert re.search(r"desktop-light: no such page", said.err)
    assert len(said.out.splitlines()) == len(VIEWS)
    assert main([str(tmp_path), "--only", "film"]) == 0
