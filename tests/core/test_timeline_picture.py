"""The picture is well-formed, and to scale."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from hf_async_batching.core.timeline import StepRecord
from hf_async_batching.core.timeline_picture import Panel, draw, steady_window


def steps(count: int, compute: float, gap: float, first: int = 0) -> list[StepRecord]:
    """Steps of `compute` ms with a gap of `gap` ms behind each; the host plans in the gap."""
    made = []
    for i in range(count):
        start = 5.0 + i * (compute + gap) * 1e-3
        end = start + compute * 1e-3
        h2d = (start - 2e-5, start - 1e-5) if i % 2 else None
        plan, settle = (start - 4e-4, start - 1e-4), (end + 1e-4, end + 2e-4)
        made.append(StepRecord(first + i, 4, 0, 4, 99, plan, settle, (start, end), h2d, (end, end + 1e-5)))
    return made


PANELS = [Panel("depth 1, synchronous", steps(12, 8.0, 2.0)), Panel("depth 2, asynchronous", steps(12, 8.0, 0.0))]


def bars(svg: str, kind: str) -> list[tuple[float, float, float]]:
    """Left, top and width of the bars of a kind; not those of the legend."""
    found = [
        (float(one.get("x", 0)), float(one.get("y", 0)), float(one.get("width", 0)))
        for one in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect")
        if one.get("class") == kind and one.get("height") != "9"
    ]
    return found


def test_both_runs_with_their_figures() -> None:
    svg = draw(PANELS)
    texts = [one.text or "" for one in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "depth 1, synchronous: 10.00 ms/step, device busy 80.0 %" in texts
    assert "depth 2, asynchronous: 8.00 ms/step, device busy 100.0 %" in texts
    assert [texts.count(lane) for lane in ("host", "h2d", "compute", "d2h")] == [2, 2, 2, 2]
    assert texts.count("idle") == 1


def test_the_same_number_of_steps_on_one_scale() -> None:
    svg = draw(PANELS, steps=5)
    lanes: dict[float, list[tuple[float, float]]] = {}
    for x, y, width in bars(svg, "compute"):
        lanes.setdefault(y, []).append((x, width))
    above, below = (lanes[y] for y in sorted(lanes))
    assert len(above) == len(below) == 5
    assert above[1][1] == pytest.approx(below[1][1]), "steps of 8 ms are equally wide"
    pitch = above[1][0] - above[0][0]
    assert pitch / (below[1][0] - below[0][0]) == pytest.approx(10 / 8, rel=1e-3)


def test_idle_gaps_are_as_wide_as_they_are() -> None:
    svg = draw(PANELS, steps=5)
    compute, idle = bars(svg, "compute"), bars(svg, "idle")
    assert len(idle) == 5, "the synchronous run's gaps, and none of the other's"
    assert len({y for _, y, _ in idle}) == 1
    assert idle[0][2] / (compute[1][0] - compute[0][0]) == pytest.approx(0.2, rel=1e-2)
    assert idle[0][0] == pytest.approx(compute[0][0] + 4 * idle[0][2], rel=1e-2), "right behind the step"


def test_nothing_is_drawn_outside() -> None:
    svg = draw(PANELS, steps=5)
    tracks = bars(svg, "track")
    left, right = tracks[0][0], max(x + width for x, _, width in tracks)
    for kind in ("plan", "settle", "copy", "compute", "idle"):
        assert bars(svg, kind), kind
        assert all(left <= x and x + width <= right + 1.3 for x, _, width in bars(svg, kind)), kind


def test_colours_for_light_and_dark() -> None:
    style = re.findall(r"<style>(.*?)</style>", draw(PANELS), re.DOTALL)[0]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    names = set(re.findall(r"var\((--\w+)\)", style))
    for scheme in (light, dark.split("} }")[0]):
        assert set(re.findall(r"(--\w+): #", scheme)) == names


def test_titles_are_escaped() -> None:
    svg = draw([Panel("a < b & c", steps(4, 1.0, 0.1))])
    ET.fromstring(svg)
    assert "a &lt; b &amp; c" in svg


def test_fewer_steps_where_there_are_fewer() -> None:
    svg = draw([PANELS[0], Panel("short", steps(3, 8.0, 1.0))])
    assert len(bars(svg, "compute")) == 4


@pytest.mark.parametrize("panels", [[], [Panel("one step", steps(1, 1.0, 0.0))]])
def test_too_little_to_draw(panels: list[Panel]) -> None:
    with pytest.raises(ValueError, match="at least two"):
        draw(panels)


def test_the_steady_window() -> None:
    prompts = [record._replace(prompt_tokens=9) for record in steps(4, 1.0, 0.0)]
    records = [*prompts, *steps(3, 1.0, 0.0, first=4), *steps(9, 1.0, 0.0, first=20)]
    assert [record.step for record in steady_window(records, 5)] == [22, 23, 24, 25, 26]
    assert [record.step for record in steady_window(records, 50)] == list(range(20, 29))
    assert [record.step for record in steady_window(prompts, 2)] == [1, 2], "where nothing only decodes"
    assert steady_window([], 3) == ()
