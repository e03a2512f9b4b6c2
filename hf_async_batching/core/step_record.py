"""When one step was planned, copied, computed and collected."""

from __future__ import annotations

from typing import NamedTuple

Span = tuple[float, float]
"""Start and end, in seconds of `time.perf_counter`."""


class StepRecord(NamedTuple):
    """The life of one step; times in seconds of `time.perf_counter`.

    Attributes:
        step: Number of the step.
        decode_rows: Rows that decoded a token.
        prompt_tokens: Prompt tokens computed.
        tokens: Tokens sampled.
        context_tokens: Tokens whose keys and values the step's attention reads, including those that it writes itself.
        plan: Host: planning and launching.
        settle: Host: reading the result and handing tokens on.
        compute: Device: from the step's first kernel to its last.
        h2d: Copy to the device; None if nothing was sent.
        d2h: Copy from the device; None if nothing was sampled.
    """

    step: int
    decode_rows: int
    prompt_tokens: int
    tokens: int
    context_tokens: int
    plan: Span
    settle: Span
    compute: Span
    h2d: Span | None
    d2h: Span | None
