"""The strip of live figures."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from demo.figures import Meter, render


def stats(**changes: Any) -> Any:
    values = {"running": 3, "waiting": 2, "tokens_per_second": 1234.56, "busy_fraction": 0.987}
    return SimpleNamespace(**(values | {"pages_in_use": 10, "pages_total": 2048} | changes))


def words(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html)).strip()


def test_all_five_figures_are_shown() -> None:
    assert words(render(stats(), "GPU busy", [])) == (
        "Tokens per second 1,234.6 Running 3 Waiting 2 GPU busy 99 % KV pages in use 10 / 2,048"
    )


def test_an_engine_that_has_not_started_has_no_pages() -> None:
    html = render(stats(pages_in_use=0, pages_total=0, busy_fraction=0.0), "CPU compute busy", [])
    assert words(html).endswith("KV pages in use 0")


def test_fractions_stay_within_their_bars() -> None:
    html = render(stats(busy_fraction=1.4, pages_in_use=5000), "GPU busy", [(-120.0, 5.0), (0.0, 10.0)])
    assert "100 <small>" not in html
    assert ">100<small> %" in html
    assert set(re.findall(r"width:([\d.]+)%", html)) == {"100.0"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_many_pages_share_one_sample() -> None:
    clock, manager = Clock(), CountingManager()
    meter = Meter(manager, "GPU busy", clock)  # type: ignore[arg-type]
    for clock.now in (0.0, 0.1, 0.5, 1.0, 1.2, 2.0):
        assert "dl" in meter.html()
    assert manager.asked == 3


def test_the_line_does_not_bridge_a_time_when_nobody_watched() -> None:
    clock, manager = Clock(), CountingManager()
    meter = Meter(manager, "GPU busy", clock)  # type: ignore[arg-type]
    for clock.now in (0.0, 1.0, 2.0, 40.0):
        html = meter.html()
    points = re.search(r'polyline points="([^"]*)"', html)
    assert points is not None
    assert len(points.group(1).split()) == 1


class CountingManager:
    asked = 0

    def stats(self) -> Any:
        self.asked += 1
        return stats()
