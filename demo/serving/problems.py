"""Explains errors in the visitor's words."""

from __future__ import annotations

import logging
from typing import NamedTuple

from hf_async_batching.errors import EngineClosedError, HfAsyncBatchingError, QueueFullError, RequestTooLongError

from .errors import BackendFailedError, LineFullError
from .pools import BusyError

logger = logging.getLogger(__name__)


class Explanation(NamedTuple):
    """A short sentence, and its details."""

    title: str
    detail: str = ""

    def plain(self) -> str:
        """Both, as plain text."""
        return f"{self.title} {self.detail}".strip()

    def markdown(self) -> str:
        """Both, as Markdown."""
        return f"**{self.title}** {self.detail}".strip()


def explain(error: Exception) -> Explanation:
    """Say what went wrong and what helps. An unexpected error is logged, and the visitor sees only its type."""
    if isinstance(error, QueueFullError):
        return Explanation("The engine's queue is full.", "Please try again in a moment.")
    if isinstance(error, RequestTooLongError):
        return Explanation("This is too long for the model.", f"Shorten it or ask for fewer new tokens: {error}")
    if isinstance(error, EngineClosedError):
        return Explanation("The engine has been shut down.", "Please reload the page later.")
    if isinstance(error, BackendFailedError):
        return Explanation("The model is not there.", str(error))
    if isinstance(error, LineFullError):
        return Explanation("Too many are waiting.", str(error))
    if isinstance(error, BusyError):
        return Explanation("The server is busy.", str(error))
    logger.error("A request failed.", exc_info=error)
    if isinstance(error, HfAsyncBatchingError):
        return Explanation("The engine could not answer.", str(error))
    return Explanation(f"Something went wrong on the server ({type(error).__name__}).", "Please try again.")
