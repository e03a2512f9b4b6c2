"""What the tests of the demo share: a stand-in for the engine, and a running page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from demo.serving.backend import Backend
from demo.serving.serving import Serving
from hf_async_batching.bench.machine import Machine
from hf_async_batching.core.request import Request

MACHINE = Machine("CPU, 1 thread", 5e9, {"torch": "2", "transformers": "5"})


@dataclass
class FakeHandle:
    """Has `per_look` more of `tokens` each time that it is asked for them, or all of them where that is 0.

    `error` is what it ends with.
    """

    tokens: Sequence[int]
    per_look: int
    request_id: str
    error: Exception | None = None
    cancelled: bool = False
    started: bool = True

    def __post_init__(self) -> None:
        self._looks = 0

    @property
    def given(self) -> list[int]:
        return list(self.tokens[: self._looks * self.per_look if self.per_look else None]) if self.started else []

    @property
    def done(self) -> bool:
        return self.cancelled or (self.started and len(self.given) == len(self.tokens))

    def tokens_from(self, position: int) -> list[int]:
        if not self.cancelled:
            self._looks += 1
        return self.given[position:]

    def cancel(self) -> None:
        if not self.done:
            self.cancelled = True

    def result(self, timeout: float | None = None) -> Any:
        assert self.done
        if self.error is not None and not self.cancelled:
            raise self.error
        metrics = SimpleNamespace(
            queue_seconds=0.0,
            time_to_first_token=0.25,
            tokens_per_second=20.0,
            total_seconds=1.0,
            cached_prompt_tokens=0,
        )
        reason = "cancelled" if self.cancelled else "eos"
        return SimpleNamespace(token_ids=self.given, finish_reason=reason, metrics=metrics)


class FakeManager:
    """Takes the calls that the demo makes of a `GenerationManager`, and remembers them."""

    def __init__(self, tokens: Sequence[int] = (), per_look: int = 0, error: Exception | None = None) -> None:
        self.tokens, self.per_look, self.error = tokens, per_look, error
        self.refuse: Exception | None = None
        self.start = True
        self.handles: list[FakeHandle] = []
        self.requests: list[Request] = []
        self.warmed: list[Request] = []

    @property
    def prompts(self) -> list[list[int]]:
        return [list(request.prompt) for request in self.requests]

    def warmup(self, requests: Sequence[Request] = ()) -> None:
        self.warmed += requests

    def submit_request(self, request: Request) -> FakeHandle:
        return self.submit_requests([request])[0]

    def submit_requests(self, requests: list[Request]) -> list[FakeHandle]:
        if self.refuse is not None:
            raise self.refuse
        self.requests += requests
        made = [
            FakeHandle(self.tokens, self.per_look, request.request_id, self.error, started=self.start)
            for request in requests
        ]
        self.handles += made
        return made


@dataclass(frozen=True)
class Served:
    """A running page."""

    url: str
    serving: Serving
    backend: Backend


def wait_until_idle(serving: Serving, seconds: float = 120.0) -> None:
    """Wait until the engine has freed everything."""
    deadline = time.monotonic() + seconds
    while (stats := serving.manager.stats()).running or stats.waiting or stats.pages_in_use or stats.rows_in_use:
        assert time.monotonic() < deadline, f"the engine still holds {stats}"
        time.sleep(0.02)
