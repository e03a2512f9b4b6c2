"""Figures and traces that follow from the times of steps."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from support.step_records import record

from hf_async_batching.core.timeline import Timeline, records_after

STEPS = (
    record(4, 10.0, 10.2, prompt_tokens=50, h2d=(9.999, 9.9995)),
    record(5, 10.3, 10.4),
    record(6, 10.4, 10.5, tokens=4),
)


def test_figures() -> None:
    timeline = Timeline(STEPS)
    assert timeline.seconds == pytest.approx(0.5)
    assert timeline.busy_fraction == pytest.approx(0.8)
    assert timeline.ms_per_step == pytest.approx(500 / 3)
    assert timeline.host_ms_per_step == pytest.approx(1.5)
    assert timeline.tokens_per_second == pytest.approx(20)


@pytest.mark.parametrize(("after", "count"), [(-1, 3), (3, 3), (4, 2), (5, 1), (6, 0), (99, 0)])
def test_reading_on_from_a_step(after: int, count: int) -> None:
    assert records_after(deque(STEPS), after) == STEPS[3 - count :]
    assert records_after((), after) == ()


def test_no_steps_are_no_error() -> None:
    empty = Timeline(())
    assert (empty.seconds, empty.busy_fraction, empty.ms_per_step, empty.host_ms_per_step) == (0, 0, 0, 0)
    assert empty.tokens_per_second == 0
    assert json.loads(json.dumps(empty.to_chrome_trace()))["traceEvents"]


def test_a_step_without_duration() -> None:
    assert Timeline((record(0, 5.0, 5.0),)).busy_fraction == 0
    assert Timeline((record(0, 5.0, 5.0),)).tokens_per_second == 0


def trace_of(timeline: Timeline) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(json.dumps(timeline.to_chrome_trace(), allow_nan=False))
    return parsed


def test_the_trace_has_four_named_lanes() -> None:
    events = trace_of(Timeline(STEPS, "CUDA"))["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert sorted(names.values()) == ["compute", "d2h", "h2d", "host"]
    (process,) = [event for event in events if event["name"] == "process_name"]
    assert process["args"]["name"] == "hf_async_batching (CUDA)"
    assert {event["ph"] for event in events} == {"M", "X"}


def test_spans_of_the_trace() -> None:
    events = trace_of(Timeline(STEPS))["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [
        (lanes[event["tid"]], event["name"], round(event["ts"]), round(event["dur"]))
        for event in events
        if event["ph"] == "X"
    ]
    # Microseconds since planning of the first step began, at 9.998 s.
    assert spans[:5] == [
        ("host", "plan and launch 4", 0, 1000),
        ("host", "settle 4", 203_000, 500),
        ("h2d", "inputs 4", 1000, 500),
        ("compute", "prefill + decode 4", 2000, 200_000),
        ("d2h", "tokens 4", 202_000, 500),
    ]
    assert [name for lane, name, *_ in spans if lane == "compute"] == ["prefill + decode 4", "decode 5", "decode 6"]
    assert len(spans) == 13, "nothing was sent for steps 5 and 6"
    last = [event for event in events if event["ph"] == "X"][-1]
    assert last["args"] == {"step": 6, "decode_rows": 3, "prompt_tokens": 0, "tokens": 4}


def test_save(tmp_path: Path) -> None:
    timeline = Timeline(STEPS)
    for path in (tmp_path / "trace.json", str(tmp_path / "other.json")):
        timeline.save(path)
        assert json.loads(Path(path).read_text(encoding="utf-8")) == trace_of(timeline)


def test_repr_says_figures() -> None:
    assert repr(Timeline(())) == "Timeline(device, no steps)"
    assert repr(Timeline(STEPS, "CUDA")) == (
        "Timeline(CUDA, 3 steps, 0.5 s, device busy 80.0 %, 166.67 ms/step, host 1.50 ms/step, 20 tok/s)"
    )


def test_a_notebook_draws_steps() -> None:
    html = Timeline(STEPS, "A<B")._repr_html_()
    tree = ET.fromstring(f"<body>{html}</body>")
    assert "device busy 80.0 %" in (tree[0].text or "")
    svg = tree.find("{http://www.w3.org/2000/svg}svg")
    assert svg is not None
    drawn = [one for one in svg.iter("{http://www.w3.org/2000/svg}rect") if one.get("class") == "compute"]
    assert len(drawn) == 2, "the last step closes the gap before it"
    for steps in ((), STEPS[:1]):
        assert "<svg" not in Timeline(steps)._repr_html_()
    many = tuple(record(i, 1.0 + i, 1.5 + i) for i in range(500))
    assert len(Timeline(many)._repr_html_()) < 20_000
