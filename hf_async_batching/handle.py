"""The caller's handle of a request, and its result."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from hf_async_batching.errors import ForkedProcessError
from hf_async_batching.runtime.forking import forks
from hf_async_batching.runtime.reentrancy import waiting_for
from hf_async_batching.text_stream import TextStream
from hf_async_batching.token_stream import AsyncTokenIterator, TokenIterator, wait_for_end

logger = logging.getLogger(__name__)

FinishReason = Literal["eos", "length", "stop", "cancelled"]


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Figures of a served request.

    Attributes:
        queue_seconds: Time from `submit` to the first step that computes its prompt; None without such a step.
        time_to_first_token: Time from `submit` to the first token, in seconds; None without tokens.
        tokens_per_second: New tokens after the first one, over the time since the first one; None with fewer than two.
        total_seconds: Time from `submit` to the end, in seconds.
        cached_prompt_tokens: Leading prompt tokens that were found in the prefix cache and not computed.
    """

    queue_seconds: float | None
    time_to_first_token: float | None
    tokens_per_second: float | None
    total_seconds: float
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished request.

    Attributes:
        request_id: Id of the request.
        token_ids: The new tokens, including an end-of-sequence token.
        finish_reason: "eos", "length", "stop" or "cancelled".
        logprobs: Log-probabilities of the tokens, if requested.
        metrics: Figures of the request.
        scores: Scores from which each new token was chosen, float32 [vocab] on the CPU, if requested.
        logits: The model's own logits of each new token, float32 [vocab] on the CPU, if requested.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float] | None
    metrics: RequestMetrics
    scores: list[torch.Tensor] | None = None
    logits: list[torch.Tensor] | None = None


class GenerationHandle:
    """A request in the engine. Iterate over it (`for` or `async for`) to get tokens as they are made.

    `text()` returns text instead of tokens; `result()` and `await handle` wait for the end. Each iterator starts with
    the first token. A wait that ends early (`asyncio.wait_for(anext(tokens), 1.0)`, Ctrl-C) loses no token: the next
    call continues at the same token. If an iteration or a wait ends early, for example because its task was cancelled,
    the request continues, because other code may read it. `cancel()` ends the request. With
    `submit(cancel_on_abandon=True)`, a task that is cancelled while it waits for the handle ends the request too.

    Args:
        request_id: Unique in its manager.
        cancel: Called with the handle to cancel the request.
        logprobs: Whether log-probabilities are returned.
        scores: Whether scores are returned.
        logits: Whether logits are returned.
        threads: Threads that deliver its tokens, and so must not wait for them.

    Attributes:
        request_id: The argument.
        cancel_on_abandon: Whether a task that is cancelled while it waits for the handle cancels the request.
    """

    def __init__(
        self,
        request_id: str,
        cancel: Callable[[GenerationHandle], None],
        *,
        logprobs: bool = False,
        scores: bool = False,
        logits: bool = False,
        threads: tuple[threading.Thread, ...] = (),
    ) -> None:
        self.request_id = request_id
        self.cancel_on_abandon = False
        self._tokenizer: Any = None  # of the `submit` call
        self._threads = threads
        self._forks = forks()
        self._cancel = cancel
        self._tokens: list[int] = []
        self._logprobs: list[float] | None = [] if logprobs else None
        self._scores: list[torch.Tensor] | None = [] if scores else None
        self._logits: list[torch.Tensor] | None = [] if logits else None
        self._reason: str | None = None
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._callbacks: list[Callable[[GenerationHandle], object]] = []
        self._changed = threading.Condition()
        self._watchers = 0
        self._async_watchers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._end_watchers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._submitted = time.perf_counter()
        self._started: float | None = None
        self._cached = 0
        self._first: float | None = None
        self._last: float | None = None

    # -- for callers ----------------------------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the end; `await handle` does the same without blocking an event loop.

        An interrupted wait (Ctrl-C) ends only itself: the engine continues with the request and all others until
        `cancel()`, or until the manager is closed, as leaving its `with` block does.

        Args:
            timeout: Seconds to wait; None waits forever.

        Raises:
            TimeoutError: The request has not finished in time; it continues.
            ReentrantCallError: Called in the engine's own thread, before the end.
            HfAsyncBatchingError: The error that ended the request. Tokens made before are in `token_ids`.
        """
        if not self._done.is_set():
            self._check_process()
            with waiting_for(self._threads, "result()"):
                in_time = self._done.wait(timeout)
            if not in_time:
                raise TimeoutError(
                    f"request {self.request_id} has not finished after {timeout} s; it goes on: "
                    "call result() again, or cancel()"
                )
        if self._error is not None:
            raise self._error
        return GenerationResult(
            self.request_id,
            list(self._tokens),
            cast(FinishReason, self._reason),
            None if self._logprobs is None else list(self._logprobs),
            self._metrics(),
            None if self._scores is None else list(self._scores),
            None if self._logits is None else list(self._logits),
        )

    def cancel(self) -> None:
        """End the request now; its row and pages are freed. Does nothing if it has ended."""
        if not self._done.is_set() and self._forks == forks():
            self._cancel(self)

    def add_done_callback(self, callback: Callable[[GenerationHandle], object]) -> None:
        """Call `callback(handle)` when the request ends, or now if it has ended.

        The callback runs in the engine's thread, which waits for it, so it should only pass the handle on. It may
        submit further requests, but must not wait for them. An exception of the callback is logged and has no other
        effect.
        """
        if not self._done.is_set():
            self._check_process()
            with self._changed:
                if not self._done.is_set():
                    self._callbacks.append(callback)
                    return
        try:
            callback(self)
        except Exception:  # as in the engine's thread; Ctrl-C in this thread is not caught
            self._log_callback()

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._done.is_set()

    @property
    def started(self) -> bool:
        """Whether the computation of its prompt has begun; before that, it waits for a row."""
        return self._started is not None

    @property
    def token_ids(self) -> list[int]:
        """The new tokens so far."""
        return list(self._tokens)

    @property
    def has_scores(self) -> bool:
        """Whether scores were requested."""
        return self._scores is not None

    def made(self, kind: Literal["scores", "logits"]) -> list[torch.Tensor] | None:
        """Scores or logits of the tokens so far, float32 [vocab] each, on the CPU; None if not requested.

        For a moment there can be one entry more than there are tokens.
        """
        return self._scores if kind == "scores" else self._logits

    def tokens_from(self, position: int) -> list[int]:
        """The new tokens from `position` on, for readers that poll: this costs the engine nothing."""
        return self._tokens[position:]

    def __iter__(self) -> Iterator[int]:
        """New tokens from the first on, each as soon as it arrives; raises the error that ends the request."""
        return TokenIterator(self)

    def __aiter__(self) -> AsyncIterator[int]:
        """Like `__iter__`, without blocking the event loop."""
        return AsyncTokenIterator(self)

    def __await__(self) -> Generator[Any, None, GenerationResult]:
        """Wait for the end without blocking the event loop; returns and raises what `result()` does."""
        yield from wait_for_end(self).__await__()
        return self.result()

    def text(self, tokenizer: Any = None, **decode_arguments: Any) -> TextStream:
        """The text as it is generated, for `for` or `async for`; joined, it equals `tokenizer.decode(token_ids)`.

        A piece ends with a whole code point: incomplete bytes of a character wait for the next token. A combining mark
        that is a separate code point may come in the piece after its letter.

        >>> for piece in handle.text(tokenizer, skip_special_tokens=True):  # doctest: +SKIP
        ...     print(piece, end="", flush=True)

        Args:
            tokenizer: The model's tokenizer; None uses the one of `submit` or of the manager.
            decode_arguments: As for `tokenizer.decode`.

        Raises:
            ValueError: There is no tokenizer.
        """
        tokenizer = tokenizer if tokenizer is not None else self._tokenizer
        if tokenizer is None:
            raise ValueError("text() needs a `tokenizer`; pass it here, to submit() or to GenerationManager")
        return TextStream(self, tokenizer, decode_arguments)

    def __repr__(self) -> str:
        failed = self._error is not None and f"failed: {type(self._error).__name__}"
        state = self._reason or failed or ("running" if self.started else "waiting")
        count = len(self._tokens)
        return f"GenerationHandle({self.request_id!r}, {state}, {count} token{'' if count == 1 else 's'})"

    # -- for the engine's thread ----------------------------------------------------------------------------------

    def _start(self, cached: int) -> None:
        if self._started is None:
            self._cached = cached
            self._started = time.perf_counter()

    def _keep(self, scores: torch.Tensor | None, logits: torch.Tensor | None) -> None:
        """Append the scores and logits from which the next token was chosen, if requested."""
        if self._scores is not None and scores is not None:
            self._scores.append(scores)
        if self._logits is not None and logits is not None:
            self._logits.append(logits)

    def _push(self, token: int, logprob: float | None, now: float) -> bool:
        """Append a token that arrived at `now`; returns whether a reader waits for it and must be woken."""
        if logprob is not None and self._logprobs is not None:
            self._logprobs.append(logprob)
        self._tokens.append(token)
        self._last = now
        if self._first is None:
            self._first = now
        return self._watchers > 0 or bool(self._async_watchers)

    def _finish(self, reason: str) -> None:
        self._reason = reason
        self._end()

    def _fail(self, error: BaseException) -> None:
        if not self._done.is_set():
            self._error = error
            self._end()

    def _end(self) -> None:
        self._ended = time.perf_counter()
        with self._changed:  # a callback is either added before this, or finds that the request has ended
            self._done.set()
        if self._callbacks:
            self._call_back()
        wake((self,))

    def _call_back(self) -> None:
        # A caller's code does not expect the engine's inference mode.
        with torch.inference_mode(False):
            for callback in self._callbacks:
                try:
                    callback(self)
                except BaseException:
                    self._log_callback()

    def _log_callback(self) -> None:
        logger.exception("a done-callback of request %s raised, which ends nothing but this callback", self.request_id)

    def _check_process(self) -> None:
        if self._forks != forks():
            raise ForkedProcessError(
                f"request {self.request_id} was submitted before this process was forked, and is served in the parent "
                "alone: submit it again in this process"
            )

    def _metrics(self) -> RequestMetrics:
        rate = None
        if self._first is not None and self._last is not None and self._last > self._first:  # two tokens or more
            rate = (len(self._tokens) - 1) / (self._last - self._first)
        return RequestMetrics(
            queue_seconds=None if self._started is None else self._started - self._submitted,
            time_to_first_token=None if self._first is None else self._first - self._submitted,
            tokens_per_second=rate,
            total_seconds=self._ended - self._submitted,
            cached_prompt_tokens=self._cached,
        )


def wake(handles: Iterable[GenerationHandle]) -> None:
    """Wake the readers of `handles`; an event loop only once for all its handles, because each call costs it a write.

    No code of a caller runs here: woken threads and loops continue later.
    """
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for handle in handles:
        if handle._watchers:
            with handle._changed:
                handle._changed.notify_all()
        for loop, event in (*handle._async_watchers, *handle._end_watchers):
            loops.setdefault(loop, []).append(event)
    for loop, events in loops.items():
        try:
            loop.call_soon_threadsafe(_set_all, events)
        except RuntimeError:
            pass  # a closed loop has nothing left to wake
        except BaseException:  # a caller's own event loop class
            logger.exception("an event loop could not be told that tokens are there")


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
