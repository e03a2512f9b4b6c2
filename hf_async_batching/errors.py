"""Errors that callers can see. Each message names the argument at fault and the remedy."""

from __future__ import annotations


class HfAsyncBatchingError(Exception):
    """Base class of every error that this package raises on purpose."""


class QueueFullError(HfAsyncBatchingError, RuntimeError):
    """The inbox holds `BatchingConfig.max_waiting` requests already; try again later or raise the bound."""


class RequestTooLongError(HfAsyncBatchingError, ValueError):
    """Prompt and new tokens do not fit the model's context or the whole KV cache."""


class EngineClosedError(HfAsyncBatchingError, RuntimeError):
    """The manager was closed, before the call or while the request was being served."""


class EngineFailedError(HfAsyncBatchingError, RuntimeError):
    """The engine's own step failed; `__cause__` holds the reason. The next call starts a fresh engine."""


class DeviceFailedError(EngineFailedError):
    """A device failed while a model was checked; the message says where, and whether it can be used again."""


class InvalidProbabilitiesError(HfAsyncBatchingError, RuntimeError):
    """A token was to be drawn from scores with NaN or inf, or that are all -inf. Tokens made before are kept."""


class ReentrantCallError(HfAsyncBatchingError, RuntimeError):
    """A call in an engine's own thread (in a logits processor or a done-callback) that would wait for that thread."""


class ForkedProcessError(HfAsyncBatchingError, RuntimeError):
    """A forked process cannot go on with what its parent's engine was doing, or use the GPU that its parent uses."""


class UnsupportedModelError(HfAsyncBatchingError, NotImplementedError):
    """The model's attention cannot be routed to the paged cache, or its outputs would not be right."""


class LogitsDifferError(UnsupportedModelError):
    """A forward's logits differ from those of plain `generate` by more than rounding explains.

    Args:
        message: What differs, and what to do.
        short: The first of it, without the model's name.
        plain: Whether two ways of plain `generate` itself differ, whatever the route.
        finite: Whether the difference is a number.
    """

    def __init__(
        self, message: str, short: str = "its logits differ", *, plain: bool = False, finite: bool = True
    ) -> None:
        super().__init__(message)
        self.short = short
        self.plain = plain
        self.finite = finite


class UnsupportedArgumentError(HfAsyncBatchingError, NotImplementedError):
    """A `generate` argument that the engine does not serve."""


class DatasetRowError(HfAsyncBatchingError, ValueError):
    """A row of a dataset cannot be served, under `on_error="raise"`. `index` is the row's.

    Args:
        message: What is wrong, and what to do.
        index: Of the row in its dataset.
    """

    def __init__(self, message: str, index: int = -1) -> None:
        super().__init__(message)
        self.index = index


class ResumeMismatchError(HfAsyncBatchingError, ValueError):
    """What a folder holds was made with other arguments, another model or other data; the message says which."""


def does_not_fit(error: Exception) -> bool:
    """Whether an error tells that a family is called in a way that it does not know, and not that a device failed.

    Shapes that do not match are plain `RuntimeError`s; torch's own failures are subclasses.
    """
    known = (TypeError, AttributeError, LookupError, ValueError, AssertionError, NotImplementedError)
    return type(error) is RuntimeError or isinstance(error, known)
