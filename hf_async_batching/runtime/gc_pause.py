"""Pause Python's cycle collector while it would do harm."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Collector:
    """Python's cycle collector, which all threads share: off while any thread wants it off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted_off = 0
        self._was_on = False

    def off(self) -> None:
        with self._lock:
            if not self._wanted_off:
                self._was_on = gc.isenabled()
                gc.disable()
            self._wanted_off += 1

    def back(self) -> None:
        with self._lock:
            self._wanted_off -= 1
            if not self._wanted_off and self._was_on:
                gc.enable()

    def in_a_child(self) -> None:
        """Forget threads that wanted it off: they do not exist in the forked process."""
        self._lock = threading.Lock()
        if self._wanted_off and self._was_on:
            gc.enable()
        self._wanted_off = 0


_collector = _Collector()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_collector.in_a_child)


@contextmanager
def no_collections() -> Iterator[None]:
    """Pause Python's cycle collector for all threads of the process.

    The objects that a start makes would trigger a full collection, which stops all threads for 0.2 to 0.4 s with torch
    and transformers loaded. A collection that frees device memory also breaks the capture of a graph.
    """
    _collector.off()
    try:
        yield
    finally:
        _collector.back()
