"""An engine is made for one state of the model: `EngineSupervisor` starts it, ends it, and replaces it.

The state is the model's modules, tensors, adapters, hooks and settings (`ModelSnapshot`), and the calling thread's
autocast. It is compared whenever a request comes:

| the engine | the model's state | what happens |
| --- | --- | --- |
| none | any | an engine starts for this state |
| serving | the same | it takes the request |
| serving | the same tensors with other values | it drops its cached prefixes, and takes the request |
| serving | another one | it takes no more requests and finishes the live ones on the old state; a new one starts |
| serving | another one, and the old tensors' memory is gone | it fails the live requests, and a new one starts |
| ending | any | the request waits for the end, and a new one starts |

So no batch and no cache ever holds requests of two states, and a model never has two caches at once.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from hf_async_batching.config import BatchingConfig
from hf_async_batching.distributed.rank_group import Quit, RankGroup, Start
from hf_async_batching.engine.background_compile import BackgroundCompile
from hf_async_batching.engine.builder import EngineParts, build_engine
from hf_async_batching.engine.engine_thread import EngineThread
from hf_async_batching.engine.follower import Follower
from hf_async_batching.engine.route import RouteHint
from hf_async_batching.errors import EngineClosedError, ReentrantCallError, UnsupportedArgumentError
from hf_async_batching.model.view.module_calls import refuse_unmarked_calls
from hf_async_batching.model.view.snapshot import ModelSnapshot
from hf_async_batching.model.view.unwrap import check_call
from hf_async_batching.runtime.autocast import Autocast
from hf_async_batching.runtime.forking import ForkSafeLock, check_device, in_fresh_thread, leave_behind, renew_in_child
from hf_async_batching.runtime.gc_pause import no_collections
from hf_async_batching.runtime.reentrancy import chooses_for, waiting_for
from hf_async_batching.runtime.size_text import size_text
from hf_async_batching.runtime.start_progress import told

logger = logging.getLogger(__name__)

_EXIT_TIMEOUT = 5.0

_open: weakref.WeakSet[EngineSupervisor] = weakref.WeakSet()
_warned: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


class ModelState(NamedTuple):
    """The state that an engine is made for."""

    snapshot: ModelSnapshot
    autocast: Autocast


class EngineSupervisor:
    """Holds the one engine of a model; any thread may use it.

    When the last reference to a supervisor is dropped, its engine finishes the live requests and ends.

    Args:
        get_model: Returns the model; None once it has been collected.
        config: Settings.
        group: The ranks over which the model is sharded; None for one process.
        hint: Result of `check_servable`; the first engine starts from it.
    """

    def __init__(
        self,
        get_model: Callable[[], PreTrainedModel | None],
        config: BatchingConfig,
        group: RankGroup | None = None,
        hint: RouteHint | None = None,
    ) -> None:
        self._get_model = get_model
        self._config = config if group is None else config.for_ranks()
        self._group = group
        # The state of a sharded model cannot be compared while its layers run.
        self._hint = hint if group is None else None
        self._lock = ForkSafeLock()
        self._thread: EngineThread | None = None
        self._made_for: ModelState | None = None
        self._compile: BackgroundCompile | None = None
        self._finalizer: weakref.finalize[..., EngineSupervisor] | None = None
        self._depth: int | None = None
        self._closed = False
        _open.add(self)
        renew_in_child(self)

    def renew(self) -> None:
        """Start without an engine in a forked process, which does not have the engine's thread; called there."""
        leave_behind(self._thread, self._compile)
        if self._finalizer is not None:
            self._finalizer.detach()
        self._thread = self._finalizer = self._compile = self._made_for = self._hint = None

    # -- the model and its engine ---------------------------------------------------------------------------------

    def model(self) -> PreTrainedModel:
        """Return the model that is served.

        Raises:
            EngineClosedError: `close()` was called, or the model has been collected.
        """
        model = self._get_model()
        if self._closed or model is None:
            raise EngineClosedError("the manager is closed; make a new GenerationManager for the model")
        return model

    def current(self) -> EngineThread:
        """Return the engine for the model as it is now; see the table above. It starts in the calling thread.

        Raises:
            EngineClosedError: See `model`.
            UnsupportedModelError: The model cannot be served as it is now.
            UnsupportedArgumentError: This is a rank other than 0, or PEFT chose adapters for this call only.
            ReentrantCallError: The engine must be replaced, and cannot end before the calling thread continues.
            ForkedProcessError: This process was forked from one that has used CUDA, and the model is on the GPU.
        """
        if self._group is not None and not self._group.leads:
            raise UnsupportedArgumentError(
                "requests of a model sharded over ranks go to rank 0's manager; call follow() on the other ranks"
            )
        while True:
            with self._lock:
                thread = self._started_or_ending()
            if thread.accepting:
                return thread
            # Not under the lock: the engine's thread may need the lock for a callback before it ends.
            with waiting_for((thread.thread,), "a request that needs the engine to be made anew"):
                thread.memory_free.wait()
            # Forget the old engine first: the new cache is sized by the memory that is free without it.
            self._forget(thread)

    @property
    def thread(self) -> EngineThread | None:
        """The engine's thread, which may have ended; None before the first engine."""
        return self._thread

    @property
    def parts(self) -> EngineParts | None:
        """The running engine and its parts; None if no engine is running."""
        thread = self._thread
        return thread.parts if thread is not None else None

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._closed

    # -- changes --------------------------------------------------------------------------------------------------

    def weights_updated(self) -> None:
        """Let the engine drop its cached prefixes, because the weights hold other values."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.weights_updated()

    def model_changed(self) -> None:
        """Let the next request start an engine for the model as it is then; live requests finish on the old state."""
        with self._lock:
            thread, self._hint = self._thread, None
        if thread is not None:
            thread.drain()

    def set_depth(self, depth: int | None) -> None:
        """Set how many steps may be in flight, now and in later engines; see `GenerationManager.set_depth`.

        Raises:
            ValueError: `depth` is out of range.
        """
        with self._lock:
            parts = self.parts
            most = parts.config.depth if parts is not None else self._config.depth
            if depth is not None and (depth < 1 or (most is not None and depth > most)):
                raise ValueError(
                    f"`depth` must be from 1 to {most or 'the depth of the engine'}, got {depth}; "
                    "for more make the manager with BatchingConfig(depth=...)"
                )
            self._depth = depth
            if parts is not None:
                parts.engine.depth = depth or parts.config.depth

    def wait_until_compiled(self) -> None:
        """Let the engine compile now, not after its first token, and wait until it is done."""
        with self._lock:
            thread, compiling = self._thread, self._compile
        if thread is not None and compiling is not None:
            thread.first_step.set()  # no request waits for a token
            compiling.done.wait()

    def close(self, timeout: float | None = None) -> None:
        """End the engine for good; see `GenerationManager.close`."""
        with self._lock:
            first, self._closed = not self._closed, True
            thread = self._thread
        if thread is not None:
            thread.stop(timeout)
        if first and self._group is not None and self._group.leads:
            self._group.send(Quit())
        _open.discard(self)

    def follow(self) -> None:
        """On a rank other than 0 of a sharded model: follow rank 0's manager until it is closed.

        Raises:
            UnsupportedArgumentError: This process is not such a rank.
            EngineFailedError: The ranks sample different tokens.
        """
        group = self._group
        if group is None or group.leads:
            raise UnsupportedArgumentError(
                "follow() is for ranks other than 0 of a sharded model; here, submit requests to the manager"
            )
        model = self.model()
        if model.device.type == "cuda":
            torch.cuda.set_device(model.device)
        Follower(group, lambda: build_engine(model, self._config, group)).follow()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _started_or_ending(self) -> EngineThread:
        """Return the engine for the model as it is now, started if needed; or the engine that must end first."""
        model = self.model()
        check_call(model)
        state = ModelState(self._snapshot_of(model), Autocast.of_this_thread(model.device.type))
        thread, made_for = self._thread, self._made_for
        if thread is None or made_for is None:
            thread = self._thread = self._start(model, state)
        elif state != made_for:
            self._end_stale(thread, moved=state.snapshot.moved_from(made_for.snapshot))
        elif state.snapshot.changes != made_for.snapshot.changes:
            self._made_for = state
            thread.weights_updated()
        return thread

    def _end_stale(self, thread: EngineThread, moved: bool) -> None:
        """End an engine whose view differs from the model, or that computes under another autocast state."""
        if thread.is_here or chooses_for(thread.thread):
            raise ReentrantCallError(
                "a request from a done-callback or a logits processor needs another engine, because the model "
                "or the autocast state differs from what the engine was made for, and that engine cannot end "
                "before the callback or processor has returned: submit the request elsewhere"
            )
        # Live requests finish on the old state, unless its memory is gone.
        if moved:
            thread.stop(timeout=0, reason="the model's weights were moved")
        else:
            thread.drain()

    def _start(self, model: PreTrainedModel, state: ModelState) -> EngineThread:
        check_device(model.device)
        if self._group is not None:
            self._group.send(Start())
        first_step = threading.Event()
        hint, self._hint = self._hint, None

        def make() -> EngineParts:
            with state.autocast(), told(type(model).__name__):
                return build_engine(model, self._config, self._group, hint)

        with no_collections():
            parts = in_fresh_thread(make)
            # Take the tensors' places again: the tensors may have become views of packed weights. Keep the modules and
            # adapters from before, so that the next request sees a switch that came in between.
            self._made_for = state._replace(snapshot=state.snapshot.placed_as(self._snapshot_of(model)))
            if self._depth is not None:
                parts.engine.depth = min(self._depth, parts.config.depth)
            compiled = parts.config.settings.compile
            self._compile = BackgroundCompile(model, parts, first_step) if compiled else None
        forget = weakref.WeakMethod(self._forget)
        thread = EngineThread(
            parts,
            max_waiting=self._config.max_waiting,
            idle_timeout=self._config.idle_timeout,
            first_step=first_step,
            on_stop=lambda stopped: _call_if_alive(forget, stopped),
        )
        self._warn_of_another(model, parts)
        if self._finalizer is not None:
            self._finalizer.detach()
        self._finalizer = weakref.finalize(self, thread.drain)
        self._finalizer.atexit = False
        return thread

    def _warn_of_another(self, model: PreTrainedModel, parts: EngineParts) -> None:
        """Log, once for a model, that another manager serves it too: each has a cache, and batches do not meet."""
        with contextlib.suppress(RuntimeError):  # another thread makes a manager meanwhile
            others = [one.parts for one in _open if one is not self and one._get_model() is model]
            running = [one for one in others if one is not None]
            if running and model not in _warned:
                _warned.add(model)
                logger.warning(
                    "a second engine serves this %s: its KV cache takes %s beside the other's %s, and requests of the "
                    "two never share a batch. For one engine pass custom_generate=manager.bind() to model.generate, "
                    "or manager=... to hf_async_batching.generate; get_manager(model).close() ends the shared one",
                    type(model).__name__,
                    size_text(parts.cache.num_bytes),
                    size_text(sum(one.cache.num_bytes for one in running)),
                )

    def _snapshot_of(self, model: PreTrainedModel) -> ModelSnapshot:
        # While layers of a sharded model run, they replace their weights by this rank's shards.
        if self._group is not None and self._made_for is not None:
            refuse_unmarked_calls(model)
            return self._made_for.snapshot
        return ModelSnapshot.of(model)

    def _forget(self, thread: EngineThread) -> None:
        with self._lock:
            if self._thread is thread:
                self._thread = None


def _call_if_alive(method: weakref.WeakMethod[Any], thread: EngineThread) -> None:
    function = method()
    if function is not None:
        function(thread)


@atexit.register
def _close_at_exit() -> None:
    for supervisor in list(_open):
        try:
            supervisor.close(_EXIT_TIMEOUT)
        except Exception:
            logger.exception("closing a manager at exit")
