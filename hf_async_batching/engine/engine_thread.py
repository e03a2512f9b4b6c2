"""The thread that owns an engine: its inbox, and the delivery of tokens and errors to callers."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch

from hf_async_batching.core.plan import Features
from hf_async_batching.core.request import Request
from hf_async_batching.devices.failure import device_failure, is_device_failure
from hf_async_batching.devices.memory import return_memory
from hf_async_batching.engine.builder import EngineParts
from hf_async_batching.errors import EngineClosedError, EngineFailedError, QueueFullError
from hf_async_batching.handle import GenerationHandle, wake
from hf_async_batching.host_decoding.logits_handle import LogitsHandle
from hf_async_batching.runtime.reentrancy import serve_in_this_thread, waiting_for
from hf_async_batching.scheduler.outputs import TokenOutput

logger = logging.getLogger(__name__)

# If nothing else can run, a chooser that takes longer gives its row and pages to waiting requests.
_CHOOSING_SECONDS = 1.0


class EngineThread:
    """Runs an engine in a thread of its own until it is stopped, idle for too long, or fails.

    Args:
        parts: The engine; from now on only the thread uses it.
        max_waiting: Number of requests that may wait for a row.
        idle_timeout: Seconds without work after which the thread ends; None for never.
        first_step: Event that the thread sets when the first request has a token, or has ended without one.
        on_stop: Called in the thread when it has ended and its memory is free.

    Attributes:
        memory_free: Set when the engine is gone and its memory is free.
    """

    def __init__(
        self,
        parts: EngineParts,
        *,
        max_waiting: int,
        idle_timeout: float | None,
        first_step: threading.Event,
        on_stop: Callable[[EngineThread], None],
    ) -> None:
        self._parts: EngineParts | None = parts
        self._device = parts.forward.device
        self._max_waiting = max_waiting
        self._idle_timeout = idle_timeout
        self._on_stop = on_stop
        self._inbox: deque[tuple[Request, GenerationHandle]] = deque()
        self._cancels: deque[GenerationHandle] = deque()
        self._warm_ups: deque[_WarmUp] = deque()
        self._choices: deque[tuple[GenerationHandle, int]] = deque()
        self._weights_changed = False
        self._handles: dict[str, GenerationHandle] = {}
        self._live: set[str] = set()
        self._changed = threading.Condition()
        self._accepting = True
        self._stopping = False
        self._reason = ""
        self.memory_free = threading.Event()
        self.first_step = first_step
        # A daemon thread, so that the process can always end; `GenerationManager` stops it at exit.
        self._thread = threading.Thread(target=self._run, name="hf_async_batching", daemon=True)
        self._thread.start()

    # -- from any thread ------------------------------------------------------------------------------------------

    def put(self, requests: list[Request], handles: Sequence[GenerationHandle]) -> bool:
        """Add requests, which reach the engine together.

        Returns:
            False if the engine takes no more requests: it has stopped or is about to.

        Raises:
            QueueFullError: There is no room for all requests; none is added.
            ValueError: Two requests have the same id, or a live request has the id of one of them; none is added.
        """
        with self._changed:
            parts = self._parts
            if not self._accepting or parts is None:
                return False
            parts.engine.pipeline.order_after_caller()
            waiting = len(self._inbox) + parts.engine.scheduler.num_waiting
            if waiting + len(requests) > self._max_waiting:
                raise QueueFullError(
                    f"no room for {len(requests)} more requests: {waiting} requests already wait "
                    f"(max_waiting={self._max_waiting}); try again later, or raise BatchingConfig(max_waiting=...)"
                )
            ids = [request.request_id for request in requests]
            if len(set(ids)) != len(ids):
                raise ValueError("`request_id`s of requests that are submitted together must differ")
            for request_id in ids:
                if request_id in self._live:
                    raise ValueError(f"`request_id` {request_id!r} is in use by a live request; choose another")
            self._live.update(ids)
            self._inbox.extend(zip(requests, handles, strict=True))
            self._changed.notify()
            return True

    def cancel(self, handle: GenerationHandle) -> None:
        """End a request; does nothing if it has ended."""
        with self._changed:
            if self._parts is None:  # its requests have ended; keep no reference to their handles
                return
            self._cancels.append(handle)
            self._changed.notify()

    def choose(self, choices: Iterable[tuple[GenerationHandle, int]]) -> None:
        """Pass on tokens that choosers have chosen; one call, so that one step computes them.

        Does nothing if the engine has stopped; the handles then raise its error.
        """
        with self._changed:
            if self._parts is None:
                return
            self._choices.extend(choices)
            self._changed.notify()

    def warm(self, features: list[Features], tune: bool = False) -> None:
        """Run and capture every decode bucket for each of `features` between two steps, and wait until this is done.

        With `tune`, kernel settings are measured first; live requests wait meanwhile.
        """
        warm_up = _WarmUp(features, tune)
        with waiting_for((self._thread,), "warmup()"):
            with self._changed:
                if not self._accepting:
                    return
                self._warm_ups.append(warm_up)
                self._changed.notify()
            while not warm_up.done.wait(0.1) and not self.memory_free.is_set():
                pass
        if warm_up.error is not None:
            raise warm_up.error

    def weights_updated(self) -> None:
        """Drop cached prefixes: later requests must not use keys and values that were computed before."""
        with self._changed:
            if self._parts is not None:
                # Work of later requests is ordered after the work that this thread has enqueued.
                self._parts.engine.pipeline.order_after_caller()
            self._weights_changed = True
            self._changed.notify()

    def drain(self) -> None:
        """Take no more requests, and stop when the live ones have ended."""
        with self._changed:
            self._accepting = False
            self._changed.notify()

    def stop(self, timeout: float | None = None, reason: str = "the manager was closed") -> None:
        """Stop at the next step; live requests fail with `EngineClosedError`.

        Returns when memory is free. In the engine's own thread it returns at once, because that thread must free it.
        """
        with self._changed:
            self._accepting = False
            self._stopping = True
            self._reason = reason
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self.memory_free.wait(timeout)

    @property
    def thread(self) -> threading.Thread:
        """The Python thread."""
        return self._thread

    @property
    def is_here(self) -> bool:
        """Whether the caller runs in the engine's own thread."""
        return threading.current_thread() is self._thread

    @property
    def parts(self) -> EngineParts | None:
        """The engine; None once the thread has stopped."""
        return self._parts

    @property
    def accepting(self) -> bool:
        """Whether the engine takes requests; once false, it stays false."""
        return self._accepting

    @property
    def num_inbox(self) -> int:
        """Number of requests that have not reached the scheduler."""
        return len(self._inbox)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: BaseException | None = None
        serve_in_this_thread()
        try:
            # A new thread inherits neither no_grad nor inference mode nor the current device.
            with torch.inference_mode():
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)
                self._serve()
        except BaseException as caught:  # callers wait for an answer, whatever the error is
            logger.exception("the engine failed: its requests fail too, and the next call starts a new engine")
            _clear_frames(caught)
            error = caught
        with self._changed:
            self._accepting = False
            parts, self._parts = self._parts, None
            # Managers keep a reference to a stopped engine thread, and a handle's error one to its caller's frames.
            for orders in (self._cancels, self._choices, self._warm_ups):
                orders.clear()
        self._fail_everyone(error, parts)
        try:
            if parts is not None:
                parts.engine.close()
        except BaseException:
            logger.exception("the engine did not close cleanly")
        del parts
        try:
            return_memory(self._device)
        except BaseException:  # the device has failed
            logger.exception("the engine's memory was not freed")
        self.memory_free.set()
        self._on_stop(self)

    def _serve(self) -> None:
        assert self._parts is not None
        while self._serve_turn(self._parts):
            pass

    def _serve_turn(self, parts: EngineParts) -> bool:
        """Wait for work and run one step; returns False if there is nothing more to do.

        A turn is a call of its own, so that a waiting thread keeps no reference to earlier requests: neither to their
        handles nor to errors, whose frames may refer to the manager.
        """
        engine = parts.engine
        with self._changed:
            while not (self._has_orders() or self._stopping or engine.has_work):
                engine.let_go()
                if engine.waits_outside:
                    if not self._changed.wait(_CHOOSING_SECONDS):
                        engine.make_way()
                    continue
                woken = self._accepting and self._changed.wait(self._idle_timeout)
                if not woken and not self._has_orders():
                    self._accepting = False
                    return False
            if self._stopping:
                return False
            arrived, cancelled, chosen = list(self._inbox), list(self._cancels), list(self._choices)
            self._inbox.clear()
            self._cancels.clear()
            self._choices.clear()
            weights_changed, self._weights_changed = self._weights_changed, False
        if weights_changed:
            engine.weights_updated()  # before later requests are added
        while self._warm_ups:
            self._warm_ups.popleft().run(parts)
        self._handles.update((request.request_id, handle) for request, handle in arrived)
        for request, handle in arrived:
            try:
                engine.add(request)
            except BaseException as error:  # a hand-made request can hold any object
                self._forget(request.request_id)
                handle._fail(error)
        for handle, token in chosen:
            if self._handles.get(handle.request_id) is handle:
                output = engine.choose(handle.request_id, token)
                if output is not None:
                    self._deliver([output])
        for handle in cancelled:
            # Compare the handle itself: by now another request may have the id.
            if self._handles.get(handle.request_id) is handle:
                output = engine.cancel(handle.request_id)
                if output is not None:
                    self._deliver([output])
        if not engine.has_work:
            return True
        token_outputs = engine.step()
        for new_row in engine.started:
            if new_row.request.request_id in self._handles:
                self._handles[new_row.request.request_id]._start(new_row.start)
        for request_id, logits in engine.offered:
            chooser_handle = self._handles[request_id]
            assert isinstance(chooser_handle, LogitsHandle)
            chooser_handle._offer(logits)
        for request_id, made in engine.outputs.items():
            self._handles[request_id]._keep(*made)
        self._deliver(token_outputs)
        if token_outputs or engine.offered:
            self.first_step.set()
        for request_id, raised in engine.failed:
            handle = self._handles[request_id]
            self._forget(request_id)
            _clear_frames(raised)
            handle._fail(raised)
        spare = engine.spare_seconds()
        if spare > 0 and self._accepting:
            # Wait to the end, even after a request has come: others may follow, and the plan is not due yet.
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, spare)
            engine.plan_delay.waited()
        return True

    def _has_orders(self) -> bool:
        return bool(self._inbox or self._cancels or self._choices or self._warm_ups or self._weights_changed)

    def _deliver(self, token_outputs: list[TokenOutput]) -> None:
        handles, now = self._handles, time.perf_counter()
        watched: list[GenerationHandle] = []
        for request_id, token, logprob, finish_reason in token_outputs:
            handle = handles[request_id]
            if token is not None and handle._push(token, logprob, now):
                watched.append(handle)
            if finish_reason is not None:
                self._forget(request_id)
                handle._finish(finish_reason)
        if watched:
            wake(watched)

    def _forget(self, request_id: str) -> None:
        del self._handles[request_id]
        self._live.discard(request_id)

    def _fail_everyone(self, cause: BaseException | None, parts: EngineParts | None) -> None:
        left = [*self._handles.values(), *[handle for _, handle in self._inbox]]
        self._handles.clear()
        self._inbox.clear()
        told = _describe_failure(cause, parts) if cause is not None and left else ""
        for handle in left:
            if cause is None:
                handle._fail(EngineClosedError(f"{self._reason} while request {handle.request_id} was live"))
            else:
                failure = EngineFailedError(f"the engine failed while request {handle.request_id} was live: {told}")
                failure.__cause__ = cause
                handle._fail(failure)


def _describe_failure(cause: BaseException, parts: EngineParts | None) -> str:
    """Describe a failure. If a device failed, also say which model and step, and whether the device is usable."""
    try:
        if parts is None or not is_device_failure(cause):
            return repr(cause)
        forward = parts.forward
        return str(device_failure(cause, forward.name, forward.route, parts.engine.in_flight, forward.device))
    except Exception:  # callers wait for an answer in any case
        logger.exception("the failure cannot be described")
        return repr(cause)


class _WarmUp:
    def __init__(self, features: list[Features], tune: bool) -> None:
        self._features = features
        self._tune = tune
        self.done = threading.Event()
        self.error: BaseException | None = None

    def run(self, parts: EngineParts) -> None:
        try:
            if self._tune:
                parts.engine.pipeline.tune()
            for features in self._features:
                parts.engine.pipeline.warm(features)
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()


def _clear_frames(error: BaseException | None) -> None:
    """Clear the locals of an error's frames: they hold the engine's tensors, and callers may keep the error."""
    seen: list[BaseException] = []
    # A caller's errors can form a cycle.
    while error is not None and not any(error is one for one in seen):
        seen.append(error)
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ if error.__cause__ is not None else error.__context__
