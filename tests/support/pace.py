"""An engine that is as slow as a test needs: what must still run then does so on any machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hf_async_batching import GenerationManager

LONG = 120.0


@contextmanager
def slowed(manager: GenerationManager, seconds: float = 0.01) -> Iterator[None]:
    """Make every step take at least `seconds` longer; who waits for the engine has the processor then."""

    def step(own: Callable[[], Any]) -> Any:
        time.sleep(seconds)
        return own()

    with _replaced(manager, step):
        yield


@contextmanager
def held(manager: GenerationManager) -> Iterator[None]:
    """Let no step begin: what has not ended cannot end here, and what waits goes on waiting."""
    go_on = threading.Event()

    def step(own: Callable[[], Any]) -> Any:
        assert go_on.wait(LONG)
        return own()

    with _replaced(manager, step):
        try:
            yield
        finally:
            go_on.set()


@contextmanager
def _replaced(manager: GenerationManager, step: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    if manager.assembly is None:
        manager.warmup()
    assembly = manager.assembly
    assert assembly is not None
    engine, own = assembly.engine, assembly.engine.step
    engine.step = lambda: step(own)  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.step = own  # type: ignore[method-assign]
