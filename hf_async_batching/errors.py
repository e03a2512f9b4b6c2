"""Errors that callers can catch. Each message names the argument and the remedy."""

from __future__ import annotations


class HfAsyncBatchingError(Exception):
    """Base class of every error that this package raises on purpose."""


class QueueFullError(HfAsyncBatchingError, RuntimeError):
    """`BatchingConfig.max_waiting` requests already wait; try again later, or raise `max_waiting`."""


class RequestTooLongError(HfAsyncBatchingError, ValueError):
    """The prompt and the new tokens exceed the model's context or the whole KV cache."""


class EngineClosedError(HfAsyncBatchingError, RuntimeError):
    """The manager was closed, before the call or while it served the request."""


class EngineFailedError(HfAsyncBatchingError, RuntimeError):
    """A step of the engine failed; `__cause__` is the reason. The next call starts a new engine."""


class DeviceFailedError(EngineFailedError):
    """A device failed during the check of a model; the message says where, and whether the device is still usable."""


class InvalidProbabilitiesError(HfAsyncBatchingError, RuntimeError):
    """A token cannot be drawn: its scores hold NaN or inf, or all are -inf. Tokens generated before are kept."""


class ReentrantCallError(HfAsyncBatchingError, RuntimeError):
    """A call in the engine's own thread (a logits processor, a done-callback) would wait for that thread."""


class ForkedProcessError(HfAsyncBatchingError, RuntimeError):
    """A forked process cannot continue requests of its parent's engine, or use the GPU that its parent uses."""


class UnsupportedModelError(HfAsyncBatchingError, NotImplementedError):
    """The engine cannot serve the model, or the model's outputs would be wrong."""


class LogitsDifferError(UnsupportedModelError):
    """A forward's logits differ from those of plain `generate` by more than rounding explains.

    Args:
        message: What differs, and the remedy.
        short: The difference in short, without the model's name.
        plain: Whether plain `generate` itself gives two different results, so that no route can agree.
        finite: Whether the difference is a finite number.
    """

    def __init__(
        self, message: str, short: str = "its logits differ", *, plain: bool = False, finite: bool = True
    ) -> None:
        super().__init__(message)
        self.short = short
        self.plain = plain
        self.finite = finite


class UnsupportedArgumentError(HfAsyncBatchingError, NotImplementedError):
    """The engine does not serve an argument of `generate`."""


class DatasetRowError(HfAsyncBatchingError, ValueError):
    """A dataset row cannot be served; raised under `on_error="raise"`. `index` is the row's index.

    Args:
        message: What is wrong, and the remedy.
        index: Index of the row in its dataset.
    """

    def __init__(self, message: str, index: int = -1) -> None:
        super().__init__(message)
        self.index = index


class ResumeMismatchError(HfAsyncBatchingError, ValueError):
    """A folder's content was made with other arguments, another model or other data; the message says which."""


def does_not_fit(error: Exception) -> bool:
    """Whether an error means that a family's code does not accept a call, and not that a device failed.

    Shape mismatches are plain `RuntimeError`s; torch's own failures are subclasses of it.
    """
    known = (TypeError, AttributeError, LookupError, ValueError, AssertionError, NotImplementedError)
    return type(error) is RuntimeError or isinstance(error, known)
