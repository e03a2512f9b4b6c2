"""Log the progress of a slow start."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

_EVERY = 5.0  # seconds
_HINT = (
    ". This is normal, and is done once: later calls find it ready. To have it done before the first call, call "
    "get_manager(model).warmup()"
)

_here = threading.local()


class _Start:
    def __init__(self, name: str) -> None:
        self._name = name
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="hf_async_batching start progress", daemon=True)
        self.stage = "it is looked at"

    def _tell(self) -> None:
        hint = _HINT
        while not self._ended.wait(_EVERY):
            seconds = time.monotonic() - self._began
            # Nothing is wrong; but without any setting of logging, lines below this level would not be seen.
            logger.warning("%s is prepared for batching, %.0f s so far: %s%s", self._name, seconds, self.stage, hint)
            hint = ""

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@contextmanager
def told(name: str) -> Iterator[None]:
    """Log every five seconds what this thread's start is doing, until it ends.

    Args:
        name: Name of what starts, for the log.
    """
    start, before = _Start(name), getattr(_here, "start", None)
    with start:
        _here.start = start
        try:
            yield
        finally:
            _here.start = before


def stage(text: str) -> None:
    """Set the current stage of this thread's start; does nothing if no start is being logged.

    Args:
        text: A clause: "its layers are compiled".
    """
    start = getattr(_here, "start", None)
    if start is not None:
        start.stage = text
