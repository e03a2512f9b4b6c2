"""Handles of requests with stopping criteria: the caller sees a token only after the criteria have seen it.

The engine fills an inner handle and does not know about criteria. A relay takes the tokens from it, asks the criteria,
and passes tokens on to the caller's handle. When the criteria say stop, the relay cancels the request and drops the
other tokens. transformers' own criteria take microseconds and share one thread of the manager. A caller's criteria can
take any time, so each such request has its own thread.
"""

from __future__ import annotations

import asyncio
import threading
import time

import torch
from transformers.generation.stopping_criteria import StoppingCriteriaList

from hf_async_batching.core.request import Request
from hf_async_batching.handle import GenerationHandle, wake
from hf_async_batching.runtime.forking import ForkSafeLock, leave_behind, renew_in_child
from hf_async_batching.runtime.reentrancy import serve_in_this_thread
from hf_async_batching.stopping.batch_scores import BatchScores
from hf_async_batching.stopping.criteria import (
    CriteriaListChecker,
    HostStopChecker,
    StopChecker,
    StopConditions,
    read_criteria,
)


class CriteriaThread:
    """The one thread for criteria that cannot block; it lives as long as there are requests with such criteria."""

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._serving: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None
        self._live = 0
        renew_in_child(self)

    def renew(self) -> None:
        """Start again in a forked process, which does not have the thread."""
        leave_behind(self._serving)
        self._serving = None
        self._live = 0

    def relay(
        self,
        handle: GenerationHandle,
        request: Request,
        criteria: StoppingCriteriaList,
        device: torch.device,
        history: list[int],
    ) -> GenerationHandle:
        """Make the caller's handle for a request; the handle ends when the criteria say so.

        Args:
            handle: The handle that the engine fills.
            request: The request of the handle.
            criteria: As for `generate`; a caller's own criteria are called once per token, with int64 [1, prompt +
                new] and the scores (None if they are not returned).
            device: Device of the tensors for a caller's criteria.
            history: Tokens of the prompt as criteria see them.
        """
        stops = read_criteria(criteria)
        checker: StopChecker
        if stops.custom:
            scores = BatchScores([handle], device) if handle.has_scores else None
            checker = CriteriaListChecker(torch.tensor([history], dtype=torch.long, device=device), criteria, scores)
        else:
            checker = HostStopChecker([history], stops)
        relay = _CriteriaRelay(handle, request, checker, stops)
        if stops.custom:
            name = f"hf_async_batching criteria of {request.request_id}"
            thread = threading.Thread(target=relay.run, name=name, daemon=True)
            relay.outer._threads = (thread, *handle._threads)
            thread.start()
        else:
            self._add(relay)
        return relay.outer

    def _add(self, relay: _CriteriaRelay) -> None:
        with self._lock:
            if self._serving is None:
                loop = asyncio.new_event_loop()
                thread = threading.Thread(
                    target=_run_loop, args=(loop,), name="hf_async_batching criteria", daemon=True
                )
                thread.start()
                self._serving = loop, thread
            loop, thread = self._serving
            self._live += 1
            relay.outer._threads = (thread, *relay.outer._threads)
            asyncio.run_coroutine_threadsafe(self._run(relay), loop)

    async def _run(self, relay: _CriteriaRelay) -> None:
        try:
            await relay.run_in_loop()
        finally:
            with self._lock:
                self._live -= 1
                if not self._live:
                    asyncio.get_running_loop().stop()
                    self._serving = None


class _CriteriaRelay:
    """Passes tokens from the engine's handle through the stop checker to the caller's handle.

    Attributes:
        outer: The caller's handle.
    """

    def __init__(self, inner: GenerationHandle, request: Request, checker: StopChecker, stops: StopConditions) -> None:
        self._inner = inner
        self._checker = checker
        self._eos = {*request.eos_token_ids, *stops.eos}
        self._count = 0
        self._over = False
        self._lock = threading.Lock()  # the caller may cancel while a criterion runs
        self.outer = GenerationHandle(
            request.request_id,
            self._cancel,
            logprobs=request.sampling.logprobs,
            scores=request.output_scores,
            logits=request.output_logits,
            threads=inner._threads,
        )

    def run(self) -> None:
        """Relay until the end, in a separate thread."""
        try:
            for token in self._inner:
                if self._take(token):
                    return
            self._end(self._inner.result().finish_reason)
        except BaseException as error:  # a criterion's error reaches its own caller
            self._fail(error)

    async def run_in_loop(self) -> None:
        """Relay until the end, in an event loop."""
        try:
            async for token in self._inner:
                if self._take(token):
                    return
            self._end(self._inner.result().finish_reason)
        except BaseException as error:
            self._fail(error)

    def _take(self, token: int) -> bool:
        """Pass on a token; returns whether the request has ended for the caller."""
        if self._over:
            return True
        stop = self._checker.step([token])[0]
        logprobs = self._inner._logprobs
        with self._lock:
            if self._over:
                return True
            if self._count == 0 and self._inner._started is not None:
                self.outer._cached, self.outer._started = self._inner._cached, self._inner._started
            logprob = None if logprobs is None else logprobs[self._count]
            scores, logits = self._inner.made("scores"), self._inner.made("logits")
            self.outer._keep(
                None if scores is None else scores[self._count], None if logits is None else logits[self._count]
            )
            self._count += 1
            watched = self.outer._push(token, logprob, time.perf_counter())
        if stop:
            self._inner.cancel()
            self._end("eos" if token in self._eos else "stop")
        elif watched:
            wake((self.outer,))
        return stop

    def _cancel(self, _: GenerationHandle) -> None:
        self._inner.cancel()
        self._end("cancelled")

    def _end(self, reason: str) -> None:
        with self._lock:
            over, self._over = self._over, True
        if not over:
            self.outer._finish(reason)

    def _fail(self, error: BaseException) -> None:
        self._inner.cancel()
        with self._lock:
            over, self._over = self._over, True
        if not over:
            self.outer._fail(error)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    serve_in_this_thread()
    try:
        loop.run_forever()
    finally:
        loop.close()
