"""Errors that keep a visitor from an answer; their messages are for the visitor."""

from __future__ import annotations


class BackendFailedError(RuntimeError):
    """There is no model or no engine; the message says why."""


class LineFullError(RuntimeError):
    """The waiting line is full; the message says what to do."""
