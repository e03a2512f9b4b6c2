"""`GenerationManager`: the engine's lifecycle, and the way in for requests."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hf_async_batching.config import BatchingConfig
from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.plan import Features
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.core.timeline import Timeline, records_after
from hf_async_batching.distributed.rank_group import Quit, RankGroup, Start, check_sendable
from hf_async_batching.drop_in.fallback import OnUnsupported, check_on_unsupported
from hf_async_batching.engine.background_compile import BackgroundCompile
from hf_async_batching.engine.builder import EngineParts, build_engine
from hf_async_batching.engine.engine_thread import Worker
from hf_async_batching.engine.follower import Follower
from hf_async_batching.engine.route import check_servable
from hf_async_batching.engine.stats import Stats, read_stats
from hf_async_batching.errors import (
    EngineClosedError,
    ReentrantCallError,
    UnsupportedArgumentError,
)
from hf_async_batching.handle import GenerationHandle
from hf_async_batching.host_decoding.chosen_handles import ChosenHandle
from hf_async_batching.host_decoding.logits_handle import LogitsHandle
from hf_async_batching.host_decoding.token_chooser import TokenChooser
from hf_async_batching.inputs.generation_fields import bound_encoder_ngrams, check_fields
from hf_async_batching.inputs.logits_processors import CallRow, Recipe, processors_of_batch, read_processors
from hf_async_batching.inputs.request_builder import (
    Seed,
    build_request,
    eos_token_ids,
    new_request_id,
    seeds_of_rows,
)
from hf_async_batching.inputs.submission import check_group, check_limits, criteria_of, group_fits, prompt_of
from hf_async_batching.model.view.model_view import make_view
from hf_async_batching.model.view.module_calls import refuse_unmarked_calls
from hf_async_batching.model.view.snapshot import ModelSnapshot
from hf_async_batching.model.view.unwrap import check_call, unwrap
from hf_async_batching.runner.prompt_embeddings import check_embeddings, check_history, check_takes_embeddings
from hf_async_batching.runtime.autocast import Autocast
from hf_async_batching.runtime.default_device import cpu_by_default
from hf_async_batching.runtime.forking import ForkSafeLock, check_device, in_fresh_thread, leave_behind, renew_in_child
from hf_async_batching.runtime.gc_pause import no_collections
from hf_async_batching.runtime.reentrancy import chooses_for, waiting_for
from hf_async_batching.runtime.start_progress import told
from hf_async_batching.scheduler.sequence import Sequence as EngineSequence
from hf_async_batching.scheduler.step_features import features_of
from hf_async_batching.stopping.criteria_relay import CriteriaThread

logger = logging.getLogger(__name__)

_EXIT_TIMEOUT = 5.0

_open_managers: weakref.WeakSet[GenerationManager] = weakref.WeakSet()


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
        inner = unwrap(model)
        self._setup(lambda: inner, config, inner)

    @classmethod
    def for_registry(cls, model: PreTrainedModel, config: BatchingConfig | None) -> GenerationManager:
        """A manager that does not keep the model alive; used by `get_manager`."""
        manager = cls.__new__(cls)
        manager._setup(weakref.ref(model), config, model)
        return manager

    def _setup(
        self, get_model: Callable[[], PreTrainedModel | None], config: BatchingConfig | None, model: PreTrainedModel
    ) -> None:
        self._group = RankGroup.of(model)
        self.config = config or BatchingConfig()
        # Refused here, before any memory is taken; the engine makes its own view when it starts.
        with told(type(model).__name__):
            check_servable(model, self.config.max_sequence_length)
        self._engine_config = self.config if self._group is None else self.config.for_ranks()
        self._get_model = get_model
        self._lock = ForkSafeLock()
        self._worker: Worker | None = None
        self._finalizer: weakref.finalize[..., GenerationManager] | None = None
        self._made_for: tuple[ModelSnapshot, Autocast] | None = None
        self._preparation: BackgroundCompile | None = None
        self._criteria_thread = CriteriaThread()
        self._takes_embeddings: Callable[[], EngineParts | None] = lambda: None  # of which engine that is known
        self._depth: int | None = None
        self._closed = False
        _open_managers.add(self)
        renew_in_child(self)

    def renew(self) -> None:
        """Begin without an engine in a forked process, which has no such thread; called there."""
        leave_behind(self._worker, self._preparation)
        if self._finalizer is not None:
            self._finalizer.detach()
        self._worker = self._finalizer = self._preparation = self._made_for = None
        self._takes_embeddings = lambda: None

    # -- serving --------------------------------------------------------------------------------------------------

    def submit(
        self,
        input_ids: list[int] | torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        logits_processor: list[Any] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        seed: Seed | None = None,
        logprobs: bool = False,
        request_id: str | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        tokenizer: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **generate_arguments: Any,
    ) -> GenerationHandle:
        """Queue one prompt; from any thread, or from an event loop after `warmup()`.

        With `max_time`, `stop_strings` or `stopping_criteria` the handle shows a token once they have passed it, and
        none beyond the stop. They are asked in threads of the manager's, for which the engine does not wait: a
        request whose criteria are slow is computed further than needed, up to `max_new_tokens`, and cut off.

        Args:
            input_ids: Token ids of the prompt: a list, or a 1-D integer tensor. None only with `inputs_embeds`.
            generation_config: As for `model.generate`; the model's own where None.
            logits_processor: Processors of your own, as for `model.generate`; they see a batch of one, in a thread of
                the request's own, for which the engine does not wait.
            prefix_allowed_tokens_fn: As for `model.generate`; its first argument is 0.
            negative_prompt_ids: As for `model.generate`, with `guidance_scale`: int64 [1, length].
            negative_prompt_attention_mask: Likewise.
            seed: Makes a sampled request reproducible, whatever else is in the batch; an integer, or a
                `torch.Generator` from which one number is drawn.
            logprobs: Also return the log-probabilities of the chosen tokens.
            request_id: Unique among the live requests; made up where None.
            stopping_criteria: As for `model.generate`: called once for each token, with int64 [1, prompt + new] on
                the device of `input_ids` (the CPU for a list) and None. What one raises, `result()` raises.
            tokenizer: For `stop_strings`.
            inputs_embeds: Embeddings of the prompt [length, hidden], in place of its token ids or beside them;
                copied.
            generate_arguments: Fields of `GenerationConfig`, as for `model.generate`.

        Raises:
            ValueError: An argument is out of range, or the prompt is empty.
            TypeError: An argument that `GenerationConfig` does not have.
            RequestTooLongError: Prompt and new tokens exceed the context or the cache.
            UnsupportedArgumentError: An argument that is not served.
            QueueFullError: `max_waiting` requests wait already.
            EngineClosedError: The manager was closed.
            ReentrantCallError: Called by a logits processor that this engine runs.
            ForkedProcessError: This process was forked from one that has used CUDA, and the model is there.
        """
        arguments = {
            "logits_processor": logits_processor,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "stopping_criteria": stopping_criteria,
            "tokenizer": tokenizer,
            "inputs_embeds": inputs_embeds,
        }
        request, criteria, history = self._prepare(
            input_ids,
            generation_config,
            seed=seed,
            logprobs=logprobs,
            request_id=request_id,
            **arguments,
            **generate_arguments,
        )
        handle = self.submit_request(request)
        if not criteria:
            return handle
        device = input_ids.device if isinstance(input_ids, torch.Tensor) else torch.device("cpu")
        return self._criteria_thread.judge(handle, request, criteria, device, history)

    def make_request(
        self,
        input_ids: list[int] | torch.Tensor,
        generation_config: GenerationConfig | None = None,
        *,
        seed: Seed | None = None,
        logprobs: bool = False,
        **generate_arguments: Any,
    ) -> Request:
        """The request that `submit` would queue, for `submit_requests`; see `submit` for arguments and errors.

        Raises:
            UnsupportedArgumentError: `stop_strings` and `max_time` are not part of a request.
        """
        request, criteria, _ = self._prepare(
            input_ids, generation_config, seed=seed, logprobs=logprobs, **generate_arguments
        )
        if criteria:
            raise UnsupportedArgumentError("`stop_strings` and `max_time` are looked after by `submit` only")
        return request

    @cpu_by_default
    def _prepare(
        self,
        input_ids: list[int] | torch.Tensor | None,
        generation_config: GenerationConfig | None,
        *,
        logits_processor: list[Any] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        seed: Seed | None = None,
        logprobs: bool = False,
        request_id: str | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        tokenizer: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **generate_arguments: Any,
    ) -> tuple[Request, StoppingCriteriaList, list[int]]:
        """A request, the criteria that are asked beside the engine, and the prompt's tokens as these see them."""
        model: Any = self._require_model()
        prompt = prompt_of(input_ids, inputs_embeds)
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
        extra = {
            "logits_processor": LogitsProcessorList(logits_processor or []),
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
        }
        (number,) = seeds_of_rows(seed, 1)
        criteria = criteria_of(config, stopping_criteria, tokenizer)
        # As in `generate`: the history of a prompt of embeddings alone begins with its completion.
        history = prompt if input_ids is not None else []
        recipe = self._recipe(history, config, max_new_tokens, number, logprobs, extra, len(prompt))
        request = build_request(prompt, config, recipe, max_new_tokens=max_new_tokens, request_id=request_id)
        if inputs_embeds is not None:
            request = replace(request, prompt_embeddings=inputs_embeds.detach().clone())
            if input_ids is None:
                check_history(request)
        return request, criteria, history

    def _recipe(
        self,
        prompt: list[int],
        config: GenerationConfig,
        max_new_tokens: float,
        seed: int,
        logprobs: bool,
        extra: dict[str, Any],
        length: int,
    ) -> Recipe:
        """What the processors come to that transformers would make for one prompt; `config` is changed.

        `length` counts the prompt's positions, of embeddings too, which processors do not see.
        """
        model: Any = self._require_model()
        eos = eos_token_ids(config)
        bound_encoder_ngrams(config, len(prompt))
        config.max_length = len(prompt) + max_new_tokens
        if config.min_new_tokens:
            config.min_length = None

        def prepare(device: torch.device) -> LogitsProcessorList:
            config._eos_token_tensor = torch.tensor(eos, device=device) if eos else None
            processors: LogitsProcessorList = model._get_logits_processor(
                config,
                input_ids_seq_length=len(prompt),
                encoder_input_ids=torch.tensor([prompt], device=device),
                device=device,
                model_kwargs={},
                **extra,
            )
            return processors

        processors = prepare(torch.device("cpu"))  # to be read, which costs a device nothing
        row = CallRow(prompt, prompt, 0, 1, eos, config._eos_token_tensor)
        do_sample = bool(config.do_sample)
        recipe = read_processors(processors, row, do_sample=do_sample, seed=seed, logprobs=logprobs)
        if recipe is not None:
            return recipe
        if model.device.type != "cpu":
            processors = prepare(model.device)
        chooser = TokenChooser(
            processors_of_batch(processors, self.plain_view),
            torch.tensor([prompt], dtype=torch.long, device=model.device),
            do_sample=do_sample,
            seeds=[seed],
            lengths=[length],
            logprobs=logprobs,
            logits=bool(config.return_dict_in_generate and config.output_logits),
        )
        sampling = SamplingParams(do_sample=do_sample, seed=seed if do_sample else 0, logprobs=logprobs)
        return sampling, LogitsParams(), 0, (), chooser

    def plain_view(self) -> PreTrainedModel:
        """A view of the model that shares its weights and runs its own attention."""
        return make_view(self._require_model(), None)

    def submit_request(self, request: Request) -> GenerationHandle:
        """Queue a request that was made by hand; see `submit` for what it raises."""
        return self.submit_requests([request])[0]

    @cpu_by_default
    def submit_requests(self, requests: list[Request]) -> list[GenerationHandle]:
        """Queue requests that arrive together, all of them or none; see `submit` for what it raises."""
        outer: list[GenerationHandle] = []
        autocast = Autocast.of_this_thread(self._require_model().device.type)

        def make(worker: Worker, requests: list[Request]) -> list[GenerationHandle]:
            outer.clear()
            handles: list[GenerationHandle] = []
            for request in requests:
                if request.chooser is not None:
                    chosen = ChosenHandle(request, worker.cancel, worker.choose, (worker.thread,), autocast)
                    handles.append(chosen.inner)
                    outer.append(chosen.outer)
                    continue
                handle = GenerationHandle(
                    request.request_id,
                    worker.cancel,
                    logprobs=request.sampling.logprobs,
                    scores=request.output_scores,
                    logits=request.output_logits,
                    threads=(worker.thread,),
                )
                handles.append(handle)
                outer.append(handle)
            return handles

        self._put(requests, make)
        return outer

    def submit_group(self, requests: list[Request]) -> list[LogitsHandle]:
        """Queue the rows of one batch, whose tokens the caller chooses from the logits of all of them.

        Raises:
            UnsupportedArgumentError: The engine does not hold them all at the same time.
        """
        made: list[LogitsHandle] = []

        def make(worker: Worker, requests: list[Request]) -> list[LogitsHandle]:
            threads = (worker.thread,)
            made[:] = [
                LogitsHandle(request.request_id, worker.cancel, worker.choose, threads=threads) for request in requests
            ]
            return made

        self._put(requests, make, check_group)
        return made

    def holds_group(self, requests: list[Request]) -> bool:
        """Whether the engine holds these requests at the same time, so that they can be a group; starts it."""
        assembly = self._require_worker().assembly
        return assembly is not None and group_fits(requests, assembly)

    def _put(
        self,
        requests: list[Request],
        make_handles: Callable[[Worker, list[Request]], Sequence[GenerationHandle]],
        check: Callable[[list[Request], EngineParts], None] | None = None,
    ) -> None:
        while True:
            worker = self._require_worker()
            assembly = worker.assembly
            if assembly is None:
                continue  # it stopped on its own just now; `_require_worker` waits for the end of that
            for request in requests:
                check_limits(request, assembly)
                if self._group is not None:
                    check_sendable(request)
            if check is not None:
                check(requests, assembly)
            requests = self._with_embeddings(requests, assembly)
            if worker.put(requests, list(make_handles(worker, requests))):
                return

    def bind(
        self,
        *,
        streamer: BaseStreamer | None = None,
        tokenizer: Any = None,
        seed: Seed | list[Seed] | None = None,
        on_unsupported: OnUnsupported = "error",
    ) -> Callable[..., Any]:
        """A callable for `model.generate(..., custom_generate=...)` that uses this manager.

        Args:
            streamer: Gets the tokens. (transformers does not hand its own `streamer` argument on.)
            tokenizer: For `stop_strings`. (Nor does it hand on this one.)
            seed: As in `hf_async_batching.generate`.
            on_unsupported: As in `hf_async_batching.generate`.

        Raises:
            ValueError: `on_unsupported` is neither "error" nor "generate".
        """
        from hf_async_batching.drop_in.generate import Bound, generate

        check_on_unsupported(on_unsupported)
        return partial(generate, manager=self, bound=Bound(streamer, tokenizer, seed, on_unsupported))

    @cpu_by_default
    def warmup(self, requests: Iterable[Request] = (), *, tune: bool = False) -> None:
        """Start the engine, wait until it is compiled, and capture its decode steps, before the first request.

        Steps are captured for greedy decoding, where the model's own generation config samples for that, and for
        what `requests` ask; those with few tokens of prompts when their sizes have come up a few times.

        Args:
            requests: Examples of requests to come, which are not run; see `make_request`.
            tune: First measure the settings of the kernels on this card (some minutes, once: what was measured is
                remembered in the user's cache folder, and used from then on with or without `tune`).

        Raises:
            UnsupportedModelError: The model's outputs would not be right.
            ReentrantCallError: Called in the engine's own thread.
        """
        if self.is_here:
            raise ReentrantCallError(
                "warmup() was called in the engine's own thread (by a logits processor or a done-callback), which it "
                "waits for: call it in another thread"
            )
        features = [*self._usual_features(), *map(_features_alone, requests)]
        worker = self._require_worker()
        assembly = worker.assembly
        if assembly is None:
            return
        config = assembly.config
        if self._preparation is not None:
            worker.first_step.set()  # nobody waits for a token
            self._preparation.done.wait()
        # A compiled forward is adopted by the step of a request, which also readies what no graph holds.
        vocab = assembly.forward.vocab_size
        length = max(1, min(8, config.max_sequence_length - 3, config.max_batch_tokens))
        prompt = tuple((7 * i + 3) % vocab for i in range(length))
        self.submit_requests([Request(new_request_id(), prompt, min(2, config.max_sequence_length - length))])[
            0
        ].result()
        worker.warm(list(dict.fromkeys(features)), tune)

    def set_depth(self, depth: int | None) -> None:
        """Change how many steps may be in flight from the next step on; tokens do not depend on it. From any thread.

        For comparing synchronous (1) with asynchronous batching on one engine, with the same pages and graphs.

        Args:
            depth: From 1 to the engine's own depth, which is `BatchingConfig.depth` or its default; None for that.

        Raises:
            ValueError: `depth` is out of its range.
        """
        with self._lock:
            worker = self._worker
            assembly = worker.assembly if worker is not None else None
            most = assembly.config.depth if assembly is not None else self.config.depth
            if depth is not None and (depth < 1 or (most is not None and depth > most)):
                raise ValueError(
                    f"`depth` must be from 1 to {most or 'the depth of the engine'}, got {depth}; "
                    "for more make the manager with BatchingConfig(depth=...)"
                )
            self._depth = depth
            if assembly is not None:
                assembly.engine.depth = depth or assembly.config.depth

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

    def model_changed(self) -> None:
        """Say that the model computes otherwise than before: the next request starts an engine for what it is then.

        Needed only for what submissions do not look at: tensors, dicts and objects in plain attributes of modules, and
        what the model's own code reads from elsewhere. Live requests end as they began. From any thread.
        """
        with self._lock:
            worker = self._worker
        if worker is not None:
            worker.drain()

    # -- looking --------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """What the engine is doing now; zeros where it is not running."""
        worker = self._worker
        return read_stats(worker.assembly if worker is not None else None, worker.num_inbox if worker else 0)

    def timeline(self, after: int = -1) -> Timeline:
        """The last `BatchingConfig.timeline_steps` steps.

        Args:
            after: Only steps with a larger number; for reading on from the last step that was seen. Numbers begin at 0
                with each start of the engine.
        """
        worker = self._worker
        assembly = worker.assembly if worker is not None else None
        if assembly is None:
            return Timeline(())
        name = "CUDA" if assembly.forward.device.type == "cuda" else "CPU"
        return Timeline(records_after(assembly.engine.records.copy(), after), name)

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
    def is_here(self) -> bool:
        """Whether this is called in the engine's own thread: by a processor that it runs, or by a done-callback."""
        worker = self._worker
        return worker is not None and worker.is_here

    @property
    def assembly(self) -> EngineParts | None:
        """The running engine and its parts, for benchmarks; None where it is not running."""
        return self._worker.assembly if self._worker is not None else None

    # -- ending ---------------------------------------------------------------------------------------------------

    def close(self, timeout: float | None = None) -> None:
        """Stop the engine and return all its memory. Live requests fail with `EngineClosedError`.

        In the engine's own thread (in a done-callback, say) it returns at once, and the engine stops right after.

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
        Follower(self._group, lambda: build_engine(model, self._engine_config, self._group)).follow()

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
        if config.do_sample or config.repetition_penalty not in (None, 1.0):
            recipe = self._recipe([0], config, 1, 0, False, {}, 1)
            features.append(_features_alone(build_request([0], config, recipe, max_new_tokens=1)))
        return features

    def _with_embeddings(self, requests: list[Request], assembly: EngineParts) -> list[Request]:
        """Bring embeddings of prompts to the device, once it is known that the model takes them."""
        if not any([request.prompt_embeddings is not None for request in requests]):
            return requests
        forward, model = assembly.forward, self._require_model()
        brought: list[Request] = []
        for request in requests:
            embeddings: Any = request.prompt_embeddings
            if embeddings is not None:
                check_embeddings(embeddings, len(request.prompt), forward)
                embeddings = embeddings.to(forward.device)
            brought.append(replace(request, prompt_embeddings=embeddings))
        with self._lock:
            if self._takes_embeddings() is not assembly:
                check_takes_embeddings(model, forward)
                self._takes_embeddings = weakref.ref(assembly)
        return brought

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
        while True:
            with self._lock:
                worker = self._worker_or_its_successor()
            if worker.accepting:
                return worker
            # Without the lock, which the engine's thread may want for a callback before it ends.
            with waiting_for((worker.thread,), "a request that needs the engine to be made anew"):
                worker.memory_free.wait()
            # The new cache is sized by what is free once the old one is not there.
            with self._lock:
                if self._worker is worker:
                    self._worker = None

    def _worker_or_its_successor(self) -> Worker:
        """The engine for the model as it is now, made if there is none; or the one whose end must be waited for."""
        model = self._require_model()
        check_call(model)
        weights, autocast = self._weights_of(model), Autocast.of_this_thread(model.device.type)
        worker = self._worker
        if worker is not None and self._made_for is not None:
            before = self._made_for[0]
            if (weights, autocast) != self._made_for:
                if worker.is_here or chooses_for(worker.thread):
                    raise ReentrantCallError(
                        "a request from a done-callback or a logits processor needs another engine, because the model "
                        "or the autocast state differs from what the engine was made for, and that engine cannot end "
                        "before the callback or processor has returned: submit the request elsewhere"
                    )
                # The view is stale, or computes in another precision. Live requests finish on what they began
                # with, unless its memory is gone.
                if weights.moved_from(before):
                    worker.stop(timeout=0, reason="the model's weights were moved")
                else:
                    worker.drain()
            elif weights.changes != before.changes:
                self._made_for = weights, autocast
                worker.weights_updated()
        if worker is None:
            worker = self._worker = self._start(model, weights, autocast)
        return worker

    def _start(self, model: PreTrainedModel, weights: ModelSnapshot, autocast: Autocast) -> Worker:
        check_device(model.device)
        if self._group is not None:
            self._group.send(Start())
        first_step = threading.Event()

        def make() -> EngineParts:
            with autocast(), told(type(model).__name__):
                return build_engine(model, self._engine_config, self._group)

        with no_collections():
            assembly = in_fresh_thread(make)
            # Where tensors lie is taken again: they may have become views of packed weights. Modules and adapters are
            # as they were before, so that a switch that comes in between is seen by the next request.
            self._made_for = weights.placed_as(self._weights_of(model)), autocast
            if self._depth is not None:
                assembly.engine.depth = min(self._depth, assembly.config.depth)
            compiled = assembly.config.settings.compile
            self._preparation = BackgroundCompile(model, assembly, first_step) if compiled else None
        forget = weakref.WeakMethod(self._forget)
        worker = Worker(
            assembly,
            max_waiting=self.config.max_waiting,
            idle_timeout=self.config.idle_timeout,
            first_step=first_step,
            on_stop=lambda stopped: _call_if_alive(forget, stopped),
        )
        if self._finalizer is not None:
            self._finalizer.detach()
        # A manager without other references finishes what it has, and goes.
        self._finalizer = weakref.finalize(self, worker.drain)
        self._finalizer.atexit = False
        return worker

    def _weights_of(self, model: PreTrainedModel) -> ModelSnapshot:
        # Layers of a spread model put their parts of weights in the weights' places while they run.
        if self._group is not None and self._made_for is not None:
            refuse_unmarked_calls(model)
            return self._made_for[0]
        return ModelSnapshot.of(model)

    def _forget(self, worker: Worker) -> None:
        with self._lock:
            if self._worker is worker:
                self._worker = None


def _features_alone(request: Request) -> Features:
    """What a decode step of this request needs."""
    sequence = EngineSequence(request, 0)
    sequence.computed = 1
    return features_of([sequence], [])


def _call_if_alive(method: weakref.WeakMethod[Any], worker: Worker) -> None:
    function = method()
    if function is not None:
        function(worker)


@atexit.register
def _close_at_exit() -> None:
    for manager in list(_open_managers):
        try:
            manager.close(_EXIT_TIMEOUT)
        except Exception:
            logger.exception("closing a manager at exit")
