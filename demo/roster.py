"""The requests of all visitors in the order in which they came: which of them still wait, and at which place."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_async_batching import GenerationHandle


class Roster:
    """Live requests by arrival. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._handles: dict[str, GenerationHandle] = {}
        self._lock = threading.Lock()

    def add(self, *handles: GenerationHandle) -> None:
        """Remember requests that were submitted just now."""
        with self._lock:
            self._handles.update((handle.request_id, handle) for handle in handles)

    def places(self) -> dict[str, int]:
        """Place in the engine's queue, from 1, by request id, of all requests whose prompt is not being computed yet.

        The engine takes requests in the order of their arrival; one that gave up its pages for others is left out.
        """
        with self._lock:
            for request_id in [request_id for request_id, handle in self._handles.items() if handle.done]:
                del self._handles[request_id]
            waiting = [request_id for request_id, handle in self._handles.items() if not handle.started]
        return {request_id: place for place, request_id in enumerate(waiting, 1)}
