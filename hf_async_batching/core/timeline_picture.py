"""Draws what host and GPU do in the same steps, synchronous above asynchronous, from recorded events."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple
from xml.sax.saxutils import escape

from hf_async_batching.core.step_record import Span, StepRecord

# Steps in a picture, and in a saved file, which also holds what runs beside the first and the last one shown.
SHOWN_STEPS = 6
SAVED_STEPS = 16

_LANES = ("host", "h2d", "compute", "d2h")
_WIDTH, _LEFT, _RIGHT = 960.0, 62.0, 12.0
_LANE, _GAP, _CAPTION, _BOTTOM = 16.0, 5.0, 26.0, 24.0
# A copy of a few bytes takes a thousandth of a step: narrower than this it could not be seen.
_NARROWEST = 1.2

_STYLE = """
svg { --paper: #ffffff; --ink: #1f2430; --faint: #8a91a0; --track: #eef0f4;
  --plan: #4f7cc4; --settle: #93b1e0; --copy: #7d6bb3; --compute: #3d9a64; --idle: #e0603f; }
@media (prefers-color-scheme: dark) { svg { --paper: #15181f; --ink: #e7eaf0; --faint: #8a91a0; --track: #232833;
  --plan: #7ba4e6; --settle: #4c6ea6; --copy: #a797dd; --compute: #57b981; --idle: #f0795a; } }
text { font: 11px system-ui, sans-serif; fill: var(--faint); }
.caption { font-size: 13px; fill: var(--ink); }
.paper { fill: var(--paper); } .track { fill: var(--track); }
.plan { fill: var(--plan); } .settle { fill: var(--settle); } .copy { fill: var(--copy); }
.compute { fill: var(--compute); } .idle { fill: var(--idle); }
""".strip()


class Panel(NamedTuple):
    """The steps of one run, oldest first; consecutive."""

    title: str
    records: Sequence[StepRecord]


class _Window(NamedTuple):
    """What is drawn of a panel: from the start of a step's compute to the start of the compute `steps` later."""

    start: float
    end: float
    steps: int
    computes: list[Span]
    idle: list[Span]

    @property
    def busy_percent(self) -> float:
        return 100 * sum(end - start for start, end in self.computes) / (self.end - self.start)

    @property
    def ms_per_step(self) -> float:
        return 1e3 * (self.end - self.start) / self.steps


def steady_window(records: Sequence[StepRecord], count: int) -> tuple[StepRecord, ...]:
    """Up to `count` consecutive steps from the middle of the longest stretch of steps that only decode.

    Where hardly anything only decodes, consecutive steps from the middle of everything.
    """
    stretches: list[list[StepRecord]] = [[]]
    for record in records:
        if stretches[-1] and record.step != stretches[-1][-1].step + 1:
            stretches.append([])
        if record.prompt_tokens:
            stretches.append([])
        else:
            stretches[-1].append(record)
    longest: Sequence[StepRecord] = max(stretches, key=len)
    if len(longest) < min(count, 3):
        longest = records
    first = max(0, (len(longest) - count) // 2)
    return tuple(longest[first : first + count])


def draw(panels: Sequence[Panel], steps: int = SHOWN_STEPS) -> str:
    """An SVG document with one panel above the other, all on one time scale and of the same number of steps.

    Args:
        panels: The runs to compare.
        steps: Steps to show, fewer where a panel has fewer.

    Raises:
        ValueError: A panel has fewer than two steps.
    """
    if not panels or any(len(panel.records) < 2 for panel in panels):
        raise ValueError("a picture needs at least two consecutive steps of every run")
    # The step after the last one closes its gap.
    steps = min([steps, *[len(panel.records) - 1 for panel in panels]])
    windows = [_window(panel.records, steps) for panel in panels]
    scale = (_WIDTH - _LEFT - _RIGHT) / max(window.end - window.start for window in windows)
    height_of_panel = _CAPTION + len(_LANES) * (_LANE + _GAP) + 8
    height = len(panels) * height_of_panel + _BOTTOM
    body = [f'<rect class="paper" width="{_WIDTH:.0f}" height="{height:.0f}"/>']
    for index, (panel, window) in enumerate(zip(panels, windows, strict=True)):
        body += _panel(panel, window, index * height_of_panel, scale)
    body += _legend()
    body += _axis(max(window.end - window.start for window in windows), scale, height)
    summary = "; ".join(_caption(panel, window) for panel, window in zip(panels, windows, strict=True))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" role="img">',
            f"<title>What host and device do in {steps} steps</title>",
            f"<desc>{escape(summary)}</desc>",
            f"<style>{_STYLE}</style>",
            *body,
            "</svg>",
            "",
        ]
    )


def _window(records: Sequence[StepRecord], steps: int) -> _Window:
    first = (len(records) - 1 - steps) // 2
    shown = records[first : first + steps + 1]
    computes = [record.compute for record in shown]
    idle = [(before[1], after[0]) for before, after in pairwise(computes) if after[0] > before[1]]
    return _Window(computes[0][0], computes[-1][0], steps, computes[:-1], idle)


def _caption(panel: Panel, window: _Window) -> str:
    return f"{panel.title}: {window.ms_per_step:.2f} ms/step, device busy {window.busy_percent:.1f} %"


def _panel(panel: Panel, window: _Window, top: float, scale: float) -> list[str]:
    out = [f'<text class="caption" x="{_LEFT:.0f}" y="{top + 18:.0f}">{escape(_caption(panel, window))}</text>']
    tops = {lane: top + _CAPTION + i * (_LANE + _GAP) for i, lane in enumerate(_LANES)}
    whole = (window.end - window.start) * scale
    for lane, y in tops.items():
        out.append(f'<text x="{_LEFT - 8:.0f}" y="{y + 12:.0f}" text-anchor="end">{lane}</text>')
        out.append(f'<rect class="track" x="{_LEFT:.0f}" y="{y:.0f}" width="{whole:.1f}" height="{_LANE:.0f}"/>')
    for record in panel.records:
        what = f"step {record.step}"
        for lane, kind, name, span in (
            ("host", "plan", "plan and launch", record.plan),
            ("host", "settle", "settle", record.settle),
            ("h2d", "copy", "inputs", record.h2d),
            ("compute", "compute", "compute", record.compute),
            ("d2h", "copy", "tokens", record.d2h),
        ):
            if span is not None:
                out += _bar(kind, f"{name}, {what}", span, window, tops[lane], scale)
    for span in window.idle:
        out += _bar("idle", "idle", span, window, tops["compute"], scale)
    return out


def _bar(kind: str, name: str, span: Span, window: _Window, y: float, scale: float) -> list[str]:
    start, end = max(span[0], window.start), min(span[1], window.end)
    if end <= start:
        return []
    # The thinnest of lines between two steps that follow each other without a gap.
    inset = 0.5 if kind == "compute" else 0.0
    x = _LEFT + (start - window.start) * scale
    width = (end - start) * scale - inset
    # A gap must not look wider than it is.
    if kind != "idle":
        width = max(_NARROWEST, width)
    return [
        f'<rect class="{kind}" x="{x:.2f}" y="{y:.0f}" width="{width:.2f}" height="{_LANE:.0f}">'
        f"<title>{escape(name)}: {1e3 * (span[1] - span[0]):.3f} ms</title></rect>"
    ]


def _axis(seconds: float, scale: float, height: float) -> list[str]:
    """A few round numbers of milliseconds."""
    milliseconds = 1e3 * seconds
    step = 10.0**-6
    for candidate in (factor * 10.0**power for power in range(-5, 7) for factor in (1, 2, 5)):
        step = candidate
        if milliseconds / candidate <= 6:
            break
    y = height - 8
    ticks = range(int(milliseconds / step) + 1)
    out = [f'<text x="{_LEFT + i * step / 1e3 * scale:.1f}" y="{y:.0f}">{i * step:g}</text>' for i in ticks]
    out.append(f'<text x="{_LEFT - 8:.0f}" y="{y:.0f}" text-anchor="end">ms</text>')
    return out


def _legend() -> list[str]:
    out, x = [], _WIDTH - _RIGHT
    for kind, name, width in (("idle", "idle", 22), ("settle", "read", 26), ("plan", "plan and launch", 94)):
        out.append(f'<text x="{x:.0f}" y="18" text-anchor="end">{name}</text>')
        out.append(f'<rect class="{kind}" x="{x - width - 12:.0f}" y="9" width="9" height="9"/>')
        x -= width + 24
    return out
