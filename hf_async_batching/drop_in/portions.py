"""Queue the requests of a call with more rows than may wait, in portions, as room becomes free."""

from __future__ import annotations

import time
from typing import Protocol

from hf_async_batching.core.request import Request
from hf_async_batching.errors import QueueFullError
from hf_async_batching.handle import GenerationHandle

_PAUSE = 0.005


class Submitting(Protocol):
    """The part of a manager that submits requests."""

    def submit_requests(self, requests: list[Request]) -> list[GenerationHandle]:
        """Queue requests, all of them or none."""
        ...


def submit_in_portions(manager: Submitting, requests: list[Request], max_waiting: int) -> list[GenerationHandle]:
    """Queue the requests of one call, in the calling thread.

    Up to `max_waiting` requests are queued at once. More requests are queued in portions: the first portion needs
    room, and the others wait for room.

    Raises:
        QueueFullError: There is no room for the first portion.
        Exception: Any error of `submit_requests`; then no request of the call stays in the queue.
    """
    size = len(requests) if len(requests) <= max_waiting else max(1, max_waiting // 2)
    handles: list[GenerationHandle] = []
    try:
        while len(handles) < len(requests):
            portion = requests[len(handles) : len(handles) + size]
            try:
                handles += manager.submit_requests(portion)
            except QueueFullError:
                if not handles:
                    raise
                time.sleep(_PAUSE)
    except BaseException:
        for handle in handles:
            handle.cancel()
        raise
    return handles
