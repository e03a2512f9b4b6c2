"""What keeps a visitor from an answer; the messages are written for the visitor."""

from __future__ import annotations


class BackendFailedError(RuntimeError):
    """The model or the engine is not there; the message says why."""


class LineFullError(RuntimeError):
    """The line of those who wait is full; the message says what to do."""
