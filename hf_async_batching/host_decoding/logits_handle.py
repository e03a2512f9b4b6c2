"""Requests whose tokens are chosen outside the engine: a handle delivers logits and takes tokens.

The engine computes the logits of a request's next token, offers them, and continues with its other requests. The
chooser runs in the caller's thread or in a thread of the request, takes as long as it needs, and returns the token. So
the engine's thread runs no code of a caller.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import torch

from hf_async_batching.errors import EngineClosedError
from hf_async_batching.handle import GenerationHandle
from hf_async_batching.runtime.reentrancy import waiting_for

Choose = Callable[[Iterable[tuple[GenerationHandle, int]]], None]


class LogitsHandle(GenerationHandle):
    """Delivers one row of logits per new token.

    Args:
        request_id: Unique in its manager.
        cancel: Called with the handle to cancel the request.
        choose: Takes handles and their chosen tokens; the requests of a group are passed together.
        threads: Threads that deliver the logits, and so must not wait for them.
        on_first: Called in the engine's thread when the first logits arrive.
    """

    def __init__(
        self,
        request_id: str,
        cancel: Callable[[GenerationHandle], None],
        choose: Choose,
        *,
        threads: tuple[threading.Thread, ...] = (),
        on_first: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(request_id, cancel, threads=threads)
        self.choose = choose
        self._offered: torch.Tensor | None = None
        self._on_first = on_first

    def next_logits(self) -> torch.Tensor:
        """Wait for the logits of the next token: float32 [vocab]. The caller owns them and may write to them.

        Raises:
            HfAsyncBatchingError: The error that ended the request.
            EngineClosedError: The request was cancelled.
            ForkedProcessError: The request was submitted before this process was forked.
        """
        if self._offered is None and not self._done.is_set():
            self._check_process()
        with waiting_for(self._threads, "a call with logits processors"), self._changed:
            self._watchers += 1
            try:
                self._changed.wait_for(lambda: self._offered is not None or self._done.is_set())
            finally:
                self._watchers -= 1
            logits, self._offered = self._offered, None
        if logits is None:
            if self._error is not None:
                raise self._error
            raise EngineClosedError(f"request {self.request_id} was cancelled while its tokens were being chosen")
        if logits.is_cuda:
            from hf_async_batching.devices.cuda import use_on_current_stream

            use_on_current_stream(logits)
        return logits

    def _offer(self, logits: torch.Tensor) -> None:
        """Hand over logits, in the engine's thread; the device work that computed them has completed."""
        with self._changed:
            self._offered = logits
            self._changed.notify_all()
        on_first, self._on_first = self._on_first, None
        if on_first is None:
            return
        try:
            on_first()
        except BaseException as error:  # the process cannot start more threads: only this request fails
            self.cancel()
            self._fail(error)
