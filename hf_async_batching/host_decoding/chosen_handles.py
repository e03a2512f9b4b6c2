"""Handles of requests with custom logits processors: each request has a thread that chooses its tokens.

The engine offers logits to an inner handle, and does not know about processors. The thread starts with the first
logits, so there are never more threads than rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from hf_async_batching.core.request import Request
from hf_async_batching.handle import GenerationHandle, wake
from hf_async_batching.host_decoding.logits_handle import Choose, LogitsHandle
from hf_async_batching.host_decoding.token_chooser import TokenChooser
from hf_async_batching.runtime.reentrancy import choosing_for, serve_in_this_thread


class ChosenHandle:
    """Chooses tokens from the logits of one request, and puts them into its caller's handle.

    Args:
        request: A request with its own chooser and without a group.
        cancel: Cancels the inner handle's request.
        choose: See `LogitsHandle`.
        threads: See `LogitsHandle`.
        autocast: The submitting thread's autocast state; processors run under it.

    Attributes:
        inner: The engine's handle.
        outer: The caller's handle.
    """

    def __init__(
        self,
        request: Request,
        cancel: Callable[[GenerationHandle], None],
        choose: Choose,
        threads: tuple[threading.Thread, ...],
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        chooser = request.chooser
        assert isinstance(chooser, TokenChooser)
        self._chooser = chooser
        self._autocast = autocast
        self._eos = frozenset(request.eos_token_ids)
        self._most = request.max_new_tokens
        self._wants = request.output_scores, request.output_logits
        self._over = False
        self._lock = threading.Lock()  # the caller may cancel while its processors run
        self._thread = threading.Thread(
            target=self._run, name=f"hf_async_batching processors of {request.request_id}", daemon=True
        )
        self.inner = LogitsHandle(request.request_id, cancel, choose, threads=threads, on_first=self._thread.start)
        self.outer = GenerationHandle(
            request.request_id,
            self._cancel,
            logprobs=request.sampling.logprobs,
            scores=request.output_scores,
            logits=request.output_logits,
            threads=(self._thread, *threads),
        )
        self.inner.add_done_callback(self._ended)

    def _run(self) -> None:
        serve_in_this_thread()
        try:
            with torch.no_grad(), self._autocast(), choosing_for(self.inner._threads):
                self._choose_all()
        except BaseException as error:  # a processor's error reaches its own caller
            self._settle(error=error)
            self.inner.cancel()

    def _choose_all(self) -> None:
        history = self._chooser.prompt
        count = 0
        while not self._over:
            logits = self.inner.next_logits().to(history.device)[None]
            if logits.is_cuda:
                torch.cuda.set_device(logits.device)
            with self._chooser.one_at_a_time():
                chosen = self._chooser(history, logits)
            token = int(chosen.tokens)
            history = torch.cat([history, chosen.tokens[:, None]], dim=-1)
            count += 1
            self._push(token, chosen.logprobs, chosen.scores, chosen.logits)
            if token in self._eos or count >= self._most:
                self._settle(reason="eos" if token in self._eos else "length")
                self.inner.cancel()
                return
            self.inner.choose([(self.inner, token)])

    def _push(
        self, token: int, logprobs: torch.Tensor | None, scores: torch.Tensor, logits: torch.Tensor | None
    ) -> None:
        keep_scores, keep_logits = self._wants
        with self._lock:
            if self._over:
                return
            if self.outer._started is None:
                self.outer._cached, self.outer._started = self.inner._cached, self.inner._started
            self.outer._keep(
                scores[0].cpu().clone() if keep_scores else None,
                logits[0].cpu().clone() if keep_logits and logits is not None else None,
            )
            logprob = None if logprobs is None else float(logprobs)
            watched = self.outer._push(token, logprob, time.perf_counter())
        if watched:
            wake((self.outer,))

    def _cancel(self, _: GenerationHandle) -> None:
        self._settle(reason="cancelled")
        self.inner.cancel()

    def _ended(self, inner: GenerationHandle) -> None:
        """Pass on the end of the request in the engine: its reason or its error."""
        if inner._error is not None:
            self._settle(error=inner._error)
        else:
            self._settle(reason="cancelled")

    def _settle(self, reason: str = "", error: BaseException | None = None) -> None:
        with self._lock:
            over, self._over = self._over, True
        if over:
            return
        if error is not None:
            self.outer._fail(error)
        else:
            self.outer._finish(reason)


def make_handles(
    requests: list[Request],
    cancel: Callable[[GenerationHandle], None],
    choose: Choose,
    thread: threading.Thread,
    autocast: Callable[[], AbstractContextManager[object]],
) -> tuple[list[GenerationHandle], list[GenerationHandle]]:
    """Make the handles that the engine fills, and those that the callers hold; without a chooser they are the same.

    Args:
        requests: Requests without a group.
        cancel: Cancels the request of a handle that the engine fills.
        choose: See `LogitsHandle`.
        thread: The engine's thread, which delivers tokens and logits.
        autocast: The submitting thread's autocast state.

    Returns:
        The engine's handles and the callers' handles, one of each per request.
    """
    inner: list[GenerationHandle] = []
    outer: list[GenerationHandle] = []
    for request in requests:
        if request.chooser is not None:
            chosen = ChosenHandle(request, cancel, choose, (thread,), autocast)
            inner.append(chosen.inner)
            outer.append(chosen.outer)
            continue
        handle = GenerationHandle(
            request.request_id,
            cancel,
            logprobs=request.sampling.logprobs,
            scores=request.output_scores,
            logits=request.output_logits,
            threads=(thread,),
        )
        inner.append(handle)
        outer.append(handle)
    return inner, outer
