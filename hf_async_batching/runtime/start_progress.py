"""Logs what a slow start is doing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

_EVERY = 5.0  # seconds

_here = threading.local()


class _Start:
    def __init__(self, name: str) -> None:
        self._name = name
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="hf_async_batching start progress", daemon=True)
        self.stage = "it is looked at"

    def _tell(self) -> None:
        while not self._ended.wait(_EVERY):
            seconds = time.monotonic() - self._began
            logger.warning("%s has been starting for %.0f s: %s", self._name, seconds, self.stage)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@contextmanager
def told(name: str) -> Iterator[None]:
    """Log what this thread's start is doing each five seconds, until it ends.

    Args:
        name: What starts, for the log.
    """
    start, before = _Start(name), getattr(_here, "start", None)
    with start:
        _here.start = start
        try:
            yield
        finally:
            _here.start = before


def stage(text: str) -> None:
    """Say what this thread's start does from now on; nothing happens where none is `told`.

    Args:
        text: A clause: "its layers are compiled".
    """
    start = getattr(_here, "start", None)
    if start is not None:
        start.stage = text
