"""`GenerationManager`: the engine's lifecycle, and the way in for requests."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from hf_async_batching.assembly import Assembly, assemble
from hf_async_batching.config import BatchingConfig
from hf_async_batching.errors import (
    EngineClosedError,
    RequestTooLongError,
    UnsupportedArgumentError,
    UnsupportedModelError,
)
from hf_async_batching.generation_fields import check_fields
from hf_async_batching.handle import GenerationHandle
from hf_async_batching.model_forward import ModelForward
from hf_async_batching.model_view import batch_dependent_rope
from hf_async_batching.plan import Features
from hf_async_batching.preparation import Preparation
from hf_async_batching.request import Request
from hf_async_batching.requests_from_config import build_request, new_request_id, seed_of_row
from hf_async_batching.staging import MAX_EOS
from hf_async_batching.stats import Stats, read_stats
from hf_async_batching.tensor_parallel.follower import Follower
from hf_async_batching.tensor_parallel.rank_group import Quit, RankGroup, Start
from hf_async_batching.timeline import Timeline
from hf_async_batching.worker import Worker

logger = logging.getLogger(__name__)

_EXIT_TIMEOUT = 5.0

_open_managers: weakref.WeakSet[GenerationManager] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class _Weights:
    """What tells whether an engine's view is still the model: its tensors, and adapters that are switched by flags.

    `changes` tells whether the same tensors hold other values: how often torch has seen them changed in place, by an
    optimizer or `load_state_dict`. It is blind to writes through `.data` and to tensors made in inference mode.
    """

    tensors: dict[int, tuple[int, torch.dtype]]
    adapters: tuple[Any, ...]
    changes: int = field(compare=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Weights:
        # Rotary frequencies that follow the longest sequence are buffers that every forward of the user's may replace.
        buffers = () if batch_dependent_rope(model) else model.buffers()
        tensors = [*model.parameters(), *buffers]
        return cls(
            {id(tensor): (tensor.data_ptr(), tensor.dtype) for tensor in tensors},
            tuple(_adapter_state(module) for module in model.modules() if hasattr(module, "merged_adapters")),
            _count_changes(tensors),
        )

    def moved_from(self, before: _Weights | None) -> bool:
        """Whether tensors that the view shares have other memory than before (`model.to`, an assigned `.data`)."""
        old = before.tensors if before is not None else {}
        return any(key in old and old[key] != place for key, place in self.tensors.items())


class GenerationManager:
    """Serves a model to any number of callers in any threads, in one batch.

    The engine starts with the first request (or `warmup()`), in the caller's thread, and stops on its own after
    `BatchingConfig.idle_timeout` seconds without work; the next request starts it again. The model object is never
    changed and its weights are shared, not copied.

    Args:
        model: A causal language model.
        config: Settings; the defaults suit most cases.

    Raises:
        UnsupportedModelError: The model's attention cannot be routed to the paged cache.
    """

    def __init__(self, model: PreTrainedModel, config: BatchingConfig | None = None) -> None:
        self._setup(lambda: model, config, model)

    @classmethod
    def for_registry(cls, model: PreTrainedModel, config: BatchingConfig | None) -> GenerationManager:
        """A manager that does not keep the model alive; used by `get_manager`."""
        manager = cls.__new__(cls)
        manager._setup(weakref.ref(model), config, model)
        return manager

    def _setup(
        self, get_model: Callable[[], PreTrainedModel | None], config: BatchingConfig | None, model: PreTrainedModel
    ) -> None:
        if not isinstance(model, PreTrainedModel) or not hasattr(model, "generate"):
            raise UnsupportedModelError(
                f"`model` must be a transformers PreTrainedModel that can generate, got {type(model).__name__}"
            )
        self._group = RankGroup.of(model)
        # Refused here, before any memory is taken; the engine makes its own view when it starts.
        ModelForward(model)
        self.config = config or BatchingConfig()
        self._engine_config = self.config if self._group is None else self.config.for_ranks()
        self._get_model = get_model
        self._lock = threading.RLock()
        self._worker: Worker | None = None
        self._finalizer: weakref.finalize[..., GenerationManager] | None = None
        self._weights: _Weights | None = None
        self._preparation: Preparation | None = None
        self._closed = False
        _open_managers.add(self)

    # -- serving --------------------------------------------------------------------------------------------------

    def submit(
        self,
        input_ids: list[int] | torch.Tensor,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | None = None,
        logprobs: bool = False,
        request_id: str | None = None,
        **generate_arguments: Any,
    ) -> GenerationHandle:
        """Queue one prompt; from any thread, or from an event loop after `warmup()`.

        Args:
            input_ids: Token ids of the prompt: a list, or a 1-D integer tensor.
            generation_config: As for `model.generate`; the model's own where None.
            seed: Makes a sampled request reproducible, whatever else is in the batch.
            logprobs: Also return the log-probabilities of the chosen tokens.
            request_id: Unique among the live requests; made up where None.
            generate_arguments: Fields of `GenerationConfig`, as for `model.generate`.

        Raises:
            ValueError: An argument is out of range, or the prompt is empty.
            TypeError: An argument that `GenerationConfig` does not have.
            RequestTooLongError: Prompt and new tokens exceed the context or the cache.
            UnsupportedArgumentError: An argument that is not served.
            QueueFullError: `max_waiting` requests wait already.
            EngineClosedError: The manager was closed.
        """
        request = self.make_request(
            input_ids,
            generation_config,
            seed=seed,
            logprobs=logprobs,
            request_id=request_id,
            **generate_arguments,
        )
        return self.submit_request(request)

    def make_request(
        self,
        input_ids: list[int] | torch.Tensor,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | None = None,
        logprobs: bool = False,
        request_id: str | None = None,
        **generate_arguments: Any,
    ) -> Request:
        """The request that `submit` would queue, for `submit_requests`; see there for arguments and errors."""
        model: Any = self._require_model()
        prompt = _prompt_list(input_ids)
        config, unknown = model._prepare_generation_config(generation_config, **generate_arguments)
        if unknown:
            raise TypeError(
                f"submit() got arguments that GenerationConfig does not have: {sorted(unknown)}; "
                "for a padded batch or model inputs other than token ids call hf_async_batching.generate"
            )
        check_fields(config)
        if (config.num_return_sequences or 1) != 1:
            raise UnsupportedArgumentError("submit() makes one sequence; call it `num_return_sequences` times")
        has_default_length = (
            generate_arguments.get("max_length") is None
            and (generation_config is None or generation_config.max_length is None)
            and model.generation_config.max_length is None
        )
        if config.max_new_tokens is not None:
            max_new_tokens = config.max_new_tokens
        elif has_default_length:
            max_new_tokens = config.max_length
        else:
            max_new_tokens = config.max_length - len(prompt)
        min_new_tokens = config.min_new_tokens or max(0, (config.min_length or 0) - len(prompt))
        return build_request(
            prompt,
            config,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            seed=seed_of_row(seed, 0),
            logprobs=logprobs,
            request_id=request_id,
        )

    def submit_request(self, request: Request) -> GenerationHandle:
        """Queue a request that was made by hand; see `submit` for what it raises."""
        return self.submit_requests([request])[0]

    def submit_requests(self, requests: list[Request]) -> list[GenerationHandle]:
        """Queue requests that arrive together, all of them or none; see `submit` for what it raises."""
        _refuse_autocast()
        while True:
            worker = self._require_worker()
            assembly = worker.assembly
            if assembly is None:
                continue  # it stopped on its own just now; `_require_worker` waits for the end of that
            for request in requests:
                _check_limits(request, assembly)
            handles = [
                GenerationHandle(request.request_id, worker.cancel, logprobs=request.sampling.logprobs)
                for request in requests
            ]
            if worker.put(requests, handles):
                return handles

    def bind(
        self,
        *,
        streamer: BaseStreamer | None = None,
        tokenizer: Any = None,  # noqa: ARG002
        seed: int | list[int] | None = None,
    ) -> Callable[..., Any]:
        """A callable for `model.generate(..., custom_generate=...)` that uses this manager.

        Args:
            streamer: Gets the tokens. (transformers does not hand its own `streamer` argument on.)
            tokenizer: For stop strings; these are not served yet, so that it has no effect.
            seed: As in `hf_async_batching.generate`.
        """
        from hf_async_batching.drop_in import generate

        return partial(generate, manager=self, bound_streamer=streamer, bound_seed=seed)

    def warmup(self, *, tune: bool = False) -> None:
        """Start the engine, wait until it is compiled, and capture its decode steps, before the first request.

        Steps are captured for greedy decoding and, where the model's own generation config samples, for that.

        Args:
            tune: First measure the settings of the kernels on this card (some minutes, once: what was measured is
                remembered in the user's cache folder, and used from then on with or without `tune`).

        Raises:
            UnsupportedModelError: The model's outputs would not be right.
        """
        _refuse_autocast()
        worker = self._require_worker()
        assembly = worker.assembly
        if assembly is None:
            return
        config = assembly.config
        if self._preparation is not None:
            self._preparation.done.wait()
        # A compiled forward is adopted by the step of a request, which also readies what no graph holds.
        vocab = assembly.forward.vocab_size
        length = max(1, min(8, config.max_sequence_length - 3, config.max_batch_tokens))
        prompt = tuple((7 * i + 3) % vocab for i in range(length))
        self.submit_requests([Request(new_request_id(), prompt, min(2, config.max_sequence_length - length))])[
            0
        ].result()
        worker.warm(self._usual_features(), tune)

    def weights_updated(self) -> None:
        """Say that the weights have changed in place: requests from now on find no keys and values computed before.

        Live requests go on with the pages that they have. Changes that torch counts (optimizers, `load_state_dict`)
        are noticed without this call when the next request comes; writes through `.data`, by another library's
        kernels or in replayed graphs, and all writes to tensors made in inference mode, are not. From any thread.
        """
        with self._lock:
            worker = self._worker
        if worker is not None:
            worker.weights_updated()

    # -- looking --------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """What the engine is doing now; zeros where it is not running."""
        worker = self._worker
        return read_stats(worker.assembly if worker is not None else None, worker.num_inbox if worker else 0)

    def timeline(self) -> Timeline:
        """The last `BatchingConfig.timeline_steps` steps."""
        worker = self._worker
        assembly = worker.assembly if worker is not None else None
        if assembly is None:
            return Timeline(())
        name = "CUDA" if assembly.forward.device.type == "cuda" else "CPU"
        return Timeline(tuple(assembly.engine.records.copy()), name)

    @property
    def model(self) -> PreTrainedModel:
        """The model that is served.

        Raises:
            EngineClosedError: The manager was closed.
        """
        return self._require_model()

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._closed

    @property
    def assembly(self) -> Assembly | None:
        """The running engine and its parts, for benchmarks; None where it is not running."""
        return self._worker.assembly if self._worker is not None else None

    # -- ending ---------------------------------------------------------------------------------------------------

    def close(self, timeout: float | None = None) -> None:
        """Stop the engine and return all its memory. Live requests fail with `EngineClosedError`.

        Args:
            timeout: Seconds to wait for the step that is running; None waits for it.
        """
        with self._lock:
            first, self._closed = not self._closed, True
            worker = self._worker
        if worker is not None:
            worker.stop(timeout)
        if first and self._group is not None and self._group.leads:
            self._group.send(Quit())
        _open_managers.discard(self)

    # -- several ranks --------------------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether requests go to this manager: always, but on the ranks of a spread model other than 0."""
        return self._group is None or self._group.leads

    @property
    def spread(self) -> bool:
        """Whether the model is spread over ranks."""
        return self._group is not None

    def follow(self) -> None:
        """On the ranks of a spread model other than 0: do what rank 0's manager says, until it is closed.

        Raises:
            UnsupportedArgumentError: This is not such a rank.
            EngineFailedError: The ranks do not compute the same.
        """
        if self._group is None or self._group.leads:
            raise UnsupportedArgumentError("follow() is for the ranks of a spread model other than 0")
        model = self._require_model()
        device = model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        Follower(self._group, lambda: assemble(model, self._engine_config, self._group)).follow()

    def __enter__(self) -> GenerationManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _usual_features(self) -> list[Features]:
        features = [Features()]
        model: Any = self._require_model()
        config, _ = model._prepare_generation_config(None)
        if config.do_sample:
            sampling = build_request(
                [0], config, max_new_tokens=1, min_new_tokens=0, seed=0, logprobs=False, request_id=None
            ).sampling
            features.append(Features(sampling=True, candidates=sampling.candidates))
        return features

    def _require_model(self) -> PreTrainedModel:
        model = self._get_model()
        if self._closed or model is None:
            raise EngineClosedError("the manager is closed; make a new GenerationManager for the model")
        return model

    def _require_worker(self) -> Worker:
        if not self.leads:
            raise UnsupportedArgumentError(
                "requests of a model that is spread over ranks go to rank 0's manager; on the others call follow()"
            )
        with self._lock:
            model = self._require_model()
            weights = _Weights.of(model)
            worker = self._worker
            if worker is not None and weights != self._weights:
                # The view is stale. Live requests finish on what they began with, unless its memory is gone.
                if weights.moved_from(self._weights):
                    worker.stop(reason="the model's weights were moved")
                else:
                    worker.drain()
            elif worker is not None and self._weights is not None and weights.changes != self._weights.changes:
                self._weights = weights
                worker.weights_updated()
            if worker is not None and not worker.accepting:
                # The new cache is sized by what is free once the old one is not there.
                worker.memory_free.wait()
                self._worker = None
            if self._worker is None:
                if self._group is not None:
                    self._group.send(Start())
                assembly = assemble(model, self._engine_config, self._group)
                # Taken again: the parameters may have become views of packed weights.
                self._weights = _Weights.of(model)
                self._preparation = Preparation(model, assembly) if assembly.config.settings.compile else None
                forget = weakref.WeakMethod(self._forget)
                self._worker = Worker(
                    assembly,
                    max_waiting=self.config.max_waiting,
                    idle_timeout=self.config.idle_timeout,
                    on_stop=lambda stopped: _call_if_alive(forget, stopped),
                )
                if self._finalizer is not None:
                    self._finalizer.detach()
                # A manager that nobody holds finishes what it has, and goes.
                self._finalizer = weakref.finalize(self, self._worker.drain)
                self._finalizer.atexit = False
            return self._worker

    def _forget(self, worker: Worker) -> None:
        with self._lock:
            if self._worker is worker:
                self._worker = None


def _adapter_state(module: Any) -> tuple[Any, ...]:
    return id(module), module.disable_adapters, tuple(module.active_adapters), tuple(module.merged_adapters)


def _count_changes(tensors: list[torch.Tensor]) -> int:
    try:
        return sum([tensor._version for tensor in tensors])
    except RuntimeError:  # tensors made in inference mode count nothing
        return sum([tensor._version for tensor in tensors if not tensor.is_inference()])


def _call_if_alive(method: weakref.WeakMethod[Any], worker: Worker) -> None:
    function = method()
    if function is not None:
        function(worker)


def _prompt_list(input_ids: list[int] | torch.Tensor) -> list[int]:
    if isinstance(input_ids, torch.Tensor):
        if input_ids.dim() != 1 or input_ids.is_floating_point():
            raise ValueError(
                f"`input_ids` must be a 1-D integer tensor or a list of ints, got shape {tuple(input_ids.shape)} and "
                f"dtype {input_ids.dtype}; submit the rows of a batch one by one, without their padding"
            )
        tokens: list[int] = input_ids.tolist()
        return tokens
    if isinstance(input_ids, Iterable) and not isinstance(input_ids, (str, bytes)):
        prompt = list(input_ids)
        if all(isinstance(token, int) for token in prompt):
            return prompt
    raise ValueError("`input_ids` must be a 1-D integer tensor or a list of ints; tokenize text first")


def _check_limits(request: Request, assembly: Assembly) -> None:
    vocab, limit = assembly.forward.vocab_size, assembly.config.max_sequence_length
    for token in request.prompt:
        if not 0 <= token < vocab:
            raise ValueError(
                f"`input_ids` holds token id {token}, outside of the model's vocabulary of {vocab} tokens"
            )
    if request.min_new_tokens and len(request.eos_token_ids) > MAX_EOS:
        raise UnsupportedArgumentError(
            f"`min_new_tokens` with more than {MAX_EOS} end-of-sequence tokens is not served "
            f"(got {len(request.eos_token_ids)}); pass fewer `eos_token_id`s"
        )
    length = len(request.prompt)
    if length + request.max_new_tokens > limit:
        settings = assembly.config.settings
        by_context = limit == settings.max_sequence_length
        bound = f"the limit of {limit} tokens per request" if by_context else f"the whole KV cache of {limit} tokens"
        remedy = "shorten the prompt or " if length >= limit else "lower `max_new_tokens` or "
        remedy += (
            "raise BatchingConfig(max_sequence_length=...)" if by_context else "raise BatchingConfig(num_pages=...)"
        )
        raise RequestTooLongError(
            f"the prompt of {length} tokens and {request.max_new_tokens} new tokens exceed {bound}; {remedy}"
        )


def _refuse_autocast() -> None:
    for device_type in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device_type):
            raise UnsupportedArgumentError(
                f"called under torch.autocast({device_type!r}), which is not served yet; leave the autocast block, "
                "or load the model in the lower precision"
            )


@atexit.register
def _close_at_exit() -> None:
    for manager in list(_open_managers):
        try:
            manager.close(_EXIT_TIMEOUT)
        except Exception:
            logger.exception("closing a manager at exit")
