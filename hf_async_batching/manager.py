"""`GenerationManager` accepts requests, and lets callers control and observe the engine."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar, Unpack

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hf_async_batching.config import BatchingConfig
from hf_async_batching.core.plan import Features
from hf_async_batching.core.request import Request
from hf_async_batching.core.timeline import Timeline
from hf_async_batching.distributed.rank_group import RankGroup, check_sendable
from hf_async_batching.engine.builder import EngineParts
from hf_async_batching.engine.engine_thread import EngineThread
from hf_async_batching.engine.limits import EmbeddingsIntake, check_group, check_limits, group_fits
from hf_async_batching.engine.media_intake import MediaIntake
from hf_async_batching.engine.route import check_servable
from hf_async_batching.engine.stats import Stats, read_stats, read_timeline
from hf_async_batching.engine.supervisor import EngineSupervisor
from hf_async_batching.errors import ReentrantCallError, UnsupportedArgumentError
from hf_async_batching.handle import GenerationHandle
from hf_async_batching.host_decoding.chosen_handles import make_handles
from hf_async_batching.host_decoding.logits_handle import LogitsHandle
from hf_async_batching.inputs.generate_arguments import RequestArguments, SubmitArguments
from hf_async_batching.inputs.input_processor import InputProcessor
from hf_async_batching.inputs.media_arguments import split_media
from hf_async_batching.inputs.prompts import PromptIds
from hf_async_batching.inputs.request_builder import Seed, new_request_id
from hf_async_batching.model.view.model_view import make_view
from hf_async_batching.model.view.unwrap import unwrap
from hf_async_batching.runtime.autocast import Autocast
from hf_async_batching.runtime.default_device import cpu_by_default
from hf_async_batching.runtime.start_progress import told
from hf_async_batching.scheduler.step_features import features_of_request
from hf_async_batching.stopping.criteria_relay import CriteriaThread

Handle = TypeVar("Handle", bound=GenerationHandle)

# Public to the other modules alone: `dir()` and an editor's completion leave them out.
_FOR_THIS_PACKAGE = {
    *("assembly", "for_registry", "holds_group", "inputs", "is_here", "leads", "spread"),
    *("media", "submit_group", "submit_request"),
}


class GenerationManager:
    """Serves a model to any number of callers in any threads, in one batch.

    The engine starts with the first request (or `warmup()`), in the caller's thread, and stops on its own after
    `BatchingConfig.idle_timeout` seconds without work; the next request starts it again. The model object is never
    changed and its weights are shared, not copied.

    Args:
        model: A causal language model.
        config: Settings; the defaults suit most cases.
        tokenizer: The model's tokenizer, for prompts that are texts, for `stop_strings` and for
            `GenerationHandle.text`, if a call passes none.

    Raises:
        UnsupportedModelError: The model cannot be served.
    """

    _tokenizer: Any = None

    def __init__(self, model: PreTrainedModel, config: BatchingConfig | None = None, *, tokenizer: Any = None) -> None:
        self._tokenizer = tokenizer
        inner = unwrap(model)
        self._setup(lambda: inner, config, inner)

    @classmethod
    def for_registry(cls, model: PreTrainedModel, config: BatchingConfig | None) -> GenerationManager:
        """Make a manager that does not keep the model alive; used by `get_manager`."""
        manager = cls.__new__(cls)
        manager._setup(weakref.ref(model), config, model)
        return manager

    def _setup(
        self, get_model: Callable[[], PreTrainedModel | None], config: BatchingConfig | None, model: PreTrainedModel
    ) -> None:
        self._group = RankGroup.of(model)
        self.config = config or BatchingConfig()
        # Refused here, before any memory is taken. The engine starts from the result of this check.
        with told(type(model).__name__):
            hint = check_servable(model, self.config.max_sequence_length)
        self._engines = engines = EngineSupervisor(get_model, self.config, self._group, hint)
        self._criteria_thread = CriteriaThread()
        self._embeddings = EmbeddingsIntake()
        self.media = MediaIntake(engines, self._embeddings, spread=self._group is not None)
        # Neither keeps the manager alive; it goes with the caller's last reference.
        self.inputs = InputProcessor(engines.model, lambda: make_view(engines.model(), None))

    def submit(
        self,
        input_ids: PromptIds | None = None,
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
        cancel_on_abandon: bool = False,
        **generate_arguments: Unpack[SubmitArguments],
    ) -> GenerationHandle:
        """Queue one prompt. Any thread may call it; an event loop may call it after `warmup()`.

        With `max_time`, `stop_strings` or `stopping_criteria`, the handle shows a token only after the criteria have
        seen it, and no token after the stop. The criteria run in threads of the manager. The engine does not wait for
        them: it computes a request with slow criteria further than needed, up to `max_new_tokens`, and drops the
        surplus tokens.

        Args:
            input_ids: The prompt: a text, which is tokenized as `tokenizer(text)` does it; or its token ids: a list of
                ints, or an integer tensor or NumPy array [length] or [1, length]. None only with `inputs_embeds`.
            generation_config: As for `model.generate`; None for the model's own.
            logits_processor: Your own processors, as for `model.generate`. They see a batch of one, in a separate
                thread of the request; the engine does not wait for it.
            prefix_allowed_tokens_fn: As for `model.generate`; its first argument is 0.
            negative_prompt_ids: As for `model.generate`, with `guidance_scale`: int64 [1, length].
            negative_prompt_attention_mask: As for `model.generate`: int64 [1, length].
            seed: Makes a sampled request reproducible, independent of the other requests; an integer, or a
                `torch.Generator` from which one number is drawn.
            logprobs: Also return the log-probabilities of the chosen tokens.
            request_id: Unique among the live requests; None makes one.
            stopping_criteria: As for `model.generate`. They are called once per token, with int64 [1, prompt + new] on
                the device of `input_ids` (the CPU for a list) and None. `result()` raises an error that a criterion
                raises.
            tokenizer: For a prompt that is a text, `stop_strings` and the handle's `text()`; None uses the manager's.
            inputs_embeds: Embeddings of the prompt [length, hidden], in place of its token ids or in addition to them;
                they are copied.
            cancel_on_abandon: If an asyncio task is cancelled while it waits for the handle (`await handle` or
                `async for`), for example because a server's client has gone, cancel the request too. A timeout of
                `asyncio.wait_for` is such a cancellation.
            generate_arguments: Fields of `GenerationConfig`, as for `model.generate`; and what a processor returns for
                pictures, videos or sounds beside `input_ids` (`pixel_values`, `image_grid_thw`, ...), for a batch of
                one prompt.

        Raises:
            ValueError: An argument is out of range, or the prompt is empty.
            TypeError: `GenerationConfig` does not have an argument.
            RequestTooLongError: The prompt and the new tokens exceed the context or the cache.
            UnsupportedArgumentError: An argument is not served.
            QueueFullError: `max_waiting` requests already wait.
            EngineClosedError: The manager was closed.
            ReentrantCallError: Called by a logits processor that this engine runs.
            ForkedProcessError: This process was forked from one that has used CUDA, and the model is on the GPU.
        """
        tokenizer = tokenizer if tokenizer is not None else self._tokenizer
        media, fields = split_media(generate_arguments)
        submission = self.inputs.read_submission(
            input_ids if not media else self.media.read(input_ids, inputs_embeds, media),
            generation_config,
            seed=seed,
            logprobs=logprobs,
            request_id=request_id,
            stopping_criteria=stopping_criteria,
            tokenizer=tokenizer,
            inputs_embeds=inputs_embeds,
            logits_processor=logits_processor,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            **fields,
        )
        handle = self.submit_request(submission.request)
        if submission.criteria:
            device = input_ids.device if isinstance(input_ids, torch.Tensor) else torch.device("cpu")
            handle = self._criteria_thread.relay(
                handle, submission.request, submission.criteria, device, submission.history
            )
        handle.cancel_on_abandon, handle._tokenizer = cancel_on_abandon, tokenizer
        return handle

    def make_request(
        self,
        input_ids: PromptIds,
        generation_config: GenerationConfig | None = None,
        *,
        seed: Seed | None = None,
        logprobs: bool = False,
        tokenizer: Any = None,
        **generate_arguments: Unpack[RequestArguments],
    ) -> Request:
        """Make the request that `submit` would queue, for `submit_requests`; see `submit` for arguments and errors.

        Raises:
            UnsupportedArgumentError: `stop_strings`, `max_time` and `stopping_criteria` are not part of a request.
        """
        submission = self.inputs.read_submission(
            input_ids,
            generation_config,
            seed=seed,
            logprobs=logprobs,
            tokenizer=tokenizer if tokenizer is not None else self._tokenizer,
            **generate_arguments,
        )
        if submission.criteria:
            raise UnsupportedArgumentError(
                "`stop_strings`, `max_time` and `stopping_criteria` are not part of a request; pass them to `submit`"
            )
        return submission.request

    def submit_request(self, request: Request) -> GenerationHandle:
        """Queue a hand-made request; see `submit` for errors."""
        return self.submit_requests([request])[0]

    @cpu_by_default
    def submit_requests(self, requests: list[Request]) -> list[GenerationHandle]:
        """Queue requests that reach the engine together, all of them or none; see `submit` for errors."""
        autocast = Autocast.of_this_thread(self.model.device.type)
        return self._put(
            requests, lambda engine, ones: make_handles(ones, engine.cancel, engine.choose, engine.thread, autocast)
        )

    def submit_group(self, requests: list[Request]) -> list[LogitsHandle]:
        """Queue the rows of one batch, whose tokens the caller chooses from the logits of all rows.

        Raises:
            UnsupportedArgumentError: The engine cannot hold all rows at the same time.
        """

        def make(engine: EngineThread, ones: list[Request]) -> tuple[list[LogitsHandle], list[LogitsHandle]]:
            threads = (engine.thread,)
            made = [LogitsHandle(one.request_id, engine.cancel, engine.choose, threads=threads) for one in ones]
            return made, made

        return self._put(requests, make, check_group)

    def holds_group(self, requests: list[Request]) -> bool:
        """Whether the engine can hold these requests at the same time, so that they can be a group; starts it."""
        parts = self._engines.current().parts
        return parts is not None and group_fits(requests, parts)

    def _put(
        self,
        requests: list[Request],
        make: Callable[[EngineThread, list[Request]], tuple[Sequence[GenerationHandle], list[Handle]]],
        check: Callable[[list[Request], EngineParts], None] | None = None,
    ) -> list[Handle]:
        """Pass requests to the engine with the first handles that `make` returns; returns the second ones."""
        while True:
            engine = self._engines.current()
            parts = engine.parts
            if parts is None:
                continue  # the engine has just stopped by itself; `current` waits until it is gone
            for request in requests:
                check_limits(request, parts)
                if self._group is not None:
                    check_sendable(request)
            if check is not None:
                check(requests, parts)
            requests = self._embeddings.bring(requests, parts, self.model)
            filled, returned = make(engine, requests)
            if engine.put(requests, filled):
                return returned

    def bind(
        self,
        *,
        streamer: BaseStreamer | None = None,
        tokenizer: Any = None,
        seed: Seed | list[Seed] | None = None,
        on_unsupported: Literal["error", "generate"] = "error",
    ) -> Callable[..., Any]:
        """Return a callable for `model.generate(..., custom_generate=...)` that uses this manager.

        Args:
            streamer: Gets the tokens.
            tokenizer: For `stop_strings`; None uses the manager's.
            seed: As in `hf_async_batching.generate`.
            on_unsupported: As in `hf_async_batching.generate`.

        Raises:
            ValueError: `on_unsupported` is neither "error" nor "generate".
        """
        # The only import against the order of the rooms, because the drop-in is built on managers.
        from hf_async_batching.drop_in.generate import bind

        tokenizer = tokenizer if tokenizer is not None else self._tokenizer
        return bind(self, streamer=streamer, tokenizer=tokenizer, seed=seed, on_unsupported=on_unsupported)

    @cpu_by_default
    def warmup(self, requests: Iterable[Request] = (), *, tune: bool = False) -> None:
        """Start the engine, wait until it is compiled, and capture its steps, before the first request.

        It captures steps for greedy decoding, for sampling if the model's own generation config asks for it, and for
        the options of `requests`: decode steps, and those with up to 1,055 prompt tokens beside few rows. Prompts
        beside more rows are captured later, when their sizes have come a few times.

        Args:
            requests: Examples of coming requests; they are not run. See `make_request`.
            tune: First measure the kernels' settings on this card. This takes some minutes, once: the results are
                stored in the user's cache folder, and later engines use them with or without `tune`.

        Raises:
            UnsupportedModelError: The model cannot be served.
            ReentrantCallError: Called in the engine's own thread.
        """
        if self.is_here:
            raise ReentrantCallError(
                "warmup() was called in the engine's own thread (by a logits processor or a done-callback), for which "
                "it would have to wait: call it in another thread"
            )
        usual = self.inputs.default_request()
        examples = [*([] if usual is None else [usual]), *requests]
        features = dict.fromkeys([Features(), *map(features_of_request, examples)])
        engine = self._engines.current()
        parts = engine.parts
        if parts is None:
            return
        self._engines.wait_until_compiled()
        # A request's step switches to a compiled forward, and prepares the work outside graphs.
        longest = parts.config.max_sequence_length
        length = max(1, min(8, longest - 3, parts.config.max_batch_tokens))
        prompt = tuple((7 * i + 3) % parts.forward.vocab_size for i in range(length))
        self.submit_request(Request(new_request_id(), prompt, min(2, longest - length))).result()
        engine.warm(list(features), tune)

    def set_depth(self, depth: int | None) -> None:
        """Set how many steps may be in flight from the next step on; tokens do not depend on it. From any thread.

        It allows comparing synchronous (1) with asynchronous batching on one engine, with the same pages and graphs.

        Args:
            depth: From 1 to the engine's own depth, which is `BatchingConfig.depth` or its default; None for that
                depth.

        Raises:
            ValueError: `depth` is out of range.
        """
        self._engines.set_depth(depth)

    def weights_updated(self) -> None:
        """Report that weights have changed in place: later requests use no keys and values computed before.

        Live requests continue with their pages. The next request notices changes that torch counts (optimizers,
        `load_state_dict`) without this call. It does not notice writes through `.data`, by another library's kernels
        or in replayed graphs, or writes to tensors made in inference mode. Any thread may call it.
        """
        self._engines.weights_updated()

    def model_changed(self) -> None:
        """Report that the model now computes something else: the next request starts an engine for its new state.

        It is needed only for changes that a new request does not check: tensors, dicts and objects in plain attributes
        of modules, and values that the model's own code reads from elsewhere. Live requests finish on the old state.
        Any thread may call it.
        """
        self._engines.model_changed()

    def stats(self) -> Stats:
        """Current figures of the engine; zeros if it is not running."""
        engine = self._engines.thread
        return read_stats(engine.parts, engine.num_inbox) if engine is not None else read_stats(None, 0)

    def timeline(self, after: int = -1) -> Timeline:
        """The last `BatchingConfig.timeline_steps` steps.

        Args:
            after: Return only steps with a larger number, to continue after the last step seen. Numbers start at 0
                with each start of the engine.
        """
        return read_timeline(self._engines.parts, after)

    @property
    def model(self) -> PreTrainedModel:
        """The served model.

        Raises:
            EngineClosedError: The manager was closed.
        """
        return self._engines.model()

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._engines.closed

    @property
    def is_here(self) -> bool:
        """Whether the caller runs in the engine's own thread: in a processor that it runs, or in a done-callback."""
        engine = self._engines.thread
        return engine is not None and engine.is_here

    @property
    def assembly(self) -> EngineParts | None:
        """The running engine and its parts, for benchmarks; None if it is not running."""
        return self._engines.parts

    def close(self, timeout: float | None = None) -> None:
        """Stop the engine and free all its memory. Live requests fail with `EngineClosedError`.

        In the engine's own thread (for example in a done-callback) it returns at once, and the engine stops right
        after.

        Args:
            timeout: Seconds to wait for the running step; None waits for it.
        """
        self._engines.close(timeout)

    @property
    def leads(self) -> bool:
        """Whether requests go to this manager: always, except on ranks other than 0 of a sharded model."""
        return self._group is None or self._group.leads

    @property
    def spread(self) -> bool:
        """Whether the model is sharded over ranks."""
        return self._group is not None

    def follow(self) -> None:
        """On a rank other than 0 of a sharded model: follow rank 0's manager until it is closed.

        Raises:
            UnsupportedArgumentError: This process is not such a rank.
            EngineFailedError: The ranks sample different tokens.
        """
        self._engines.follow()

    def __repr__(self) -> str:
        if self.closed:
            return "GenerationManager(closed)"
        now = self.stats().in_words() if self.assembly is not None else "engine not running"
        return f"GenerationManager({type(self.model).__name__}, {now})"

    def __dir__(self) -> list[str]:
        return sorted(set(super().__dir__()) - _FOR_THIS_PACKAGE)

    def __enter__(self) -> GenerationManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
