"""`generate`: the callable for `model.generate(..., custom_generate=...)`, which can also be called directly.

transformers prepares everything (padding, lengths, special tokens, processors) and calls the function once. The rows
of the batch become requests of the model's shared manager, which serves them together with the rows of all other
calls.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hf_async_batching.config import BatchingConfig
from hf_async_batching.drop_in.call import (
    CallSettings,
    GenerateOutput,
    PreparedCall,
    serve,
    with_stop_strings,
)
from hf_async_batching.drop_in.caller_frame import CallerArguments, read_caller_frame
from hf_async_batching.drop_in.fallback import (
    OnUnsupported,
    check_on_unsupported,
    decode_plainly,
    note,
    raise_if_refused,
)
from hf_async_batching.errors import ReentrantCallError, UnsupportedArgumentError, UnsupportedModelError
from hf_async_batching.inputs.media_arguments import MEDIA, TOKEN_TYPES, media_of, user_name
from hf_async_batching.inputs.request_builder import Seed
from hf_async_batching.manager import GenerationManager
from hf_async_batching.model.view.model_view import refuse_unservable
from hf_async_batching.model.view.unwrap import transformers_generate
from hf_async_batching.registry import get_manager


@dataclass(frozen=True, slots=True)
class Bound:
    """The arguments that `GenerationManager.bind` fixes for a callable."""

    streamer: BaseStreamer | None = None
    tokenizer: Any = None
    seed: Seed | list[Seed] | None = None
    on_unsupported: OnUnsupported = "error"


def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor | None = None,
    *,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: BaseStreamer | None = None,
    tokenizer: Any = None,
    stop_strings: str | list[str] | None = None,
    seed: Seed | list[Seed] | None = None,
    on_unsupported: OnUnsupported | None = None,
    manager: GenerationManager | None = None,
    batching_config: BatchingConfig | None = None,
    bound: Bound | None = None,
    inputs_tensor: torch.Tensor | None = None,
    **kwargs: Any,
) -> GenerateOutput:
    """Like `model.generate`, served by the asynchronous engine together with all other calls on the model.

    Use it in place, `model.generate(**inputs, custom_generate=hf_async_batching.generate)`, or directly,
    `hf_async_batching.generate(model, **inputs)`; the arguments are those of `model.generate`.

    Stopping criteria and the streamer run in the calling thread, on tokens as they arrive. The engine does not wait
    for them; its tokens beyond a stop are dropped. A call from a done-callback, in the engine's own thread, goes to
    plain `model.generate`; this is logged once.

    Args:
        model: A causal language model; not changed.
        input_ids: Prompts [batch, length], padded on the left according to `attention_mask`, which holds zeros and
            ones. Padding on the right is refused: `generate` would continue after it. Zeros between tokens are served
            if all layers attend to all tokens.
        logits_processor: As for `generate`. Custom processors see the rows of the call as one batch, in the calling
            thread; other calls do not wait for it. Processors with an attribute `row_wise = True` are called row by
            row, in separate threads, one at a time.
        stopping_criteria: As for `generate`, and called as there: once per step with the whole batch.
        generation_config: As for `generate`. In place, it must not hold `stop_strings`: pass them as an argument.
        streamer: As for `generate`.
        tokenizer: For `stop_strings`.
        stop_strings: As for `generate`.
        seed: Makes sampling reproducible, independent of the rest of the batch: one for the call, or one per sequence;
            each is an integer, or a `torch.Generator` from which one number is drawn.
        on_unsupported: For a call that the engine does not serve (beams, an assistant, an encoder, a model that was
            refused, ...): "error" (default) raises; "generate" passes it to plain `model.generate` and logs the
            reason once.
        manager: The manager to use; None for the model's shared one.
        batching_config: Settings for the model's shared manager, if this call makes it.
        bound: Set by `GenerationManager.bind`.
        inputs_tensor: Set by transformers.
        kwargs: All other arguments of `generate`, with those that processors return for pictures, videos or sounds.

    Returns:
        The result of `generate`: int64 [batch * num_return_sequences, length + new], filled on the right with the pad
        token, on the device of the prompts. With `return_dict_in_generate=True`, a `GenerateDecoderOnlyOutput` with
        these `sequences`, without a cache (it is shared). Its `scores` and `logits`, if requested, are those of
        `generate`, but 0 for rows that have ended.

    Raises:
        UnsupportedArgumentError: An argument is not served; the message names it and the remedy.
        UnsupportedModelError: The model is not served.
        ValueError: An argument is out of range.
        RequestTooLongError: The prompt and the new tokens exceed the context or the cache.
    """
    bound = bound or Bound()
    on_unsupported = on_unsupported if on_unsupported is not None else bound.on_unsupported
    check_on_unsupported(on_unsupported)
    settings = CallSettings(
        streamer=streamer if streamer is not None else bound.streamer,
        tokenizer=tokenizer if tokenizer is not None else bound.tokenizer,
        stop_strings=stop_strings,
        seed=seed if seed is not None else bound.seed,
        plain=on_unsupported == "generate",
        manager=manager,
        batching_config=batching_config,
    )
    if logits_processor is None or stopping_criteria is None or not hasattr(generation_config, "_eos_token_tensor"):
        arguments = {
            "input_ids": input_ids,
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            **kwargs,
        }
        return _directly(model, arguments, settings)
    assert input_ids is not None and generation_config is not None
    prepared = PreparedCall(model, input_ids, logits_processor, stopping_criteria, generation_config, kwargs)
    return _in_place(prepared, settings, inputs_tensor)


def bind(
    manager: GenerationManager,
    *,
    streamer: BaseStreamer | None = None,
    tokenizer: Any = None,
    seed: Seed | list[Seed] | None = None,
    on_unsupported: OnUnsupported = "error",
) -> Callable[..., GenerateOutput]:
    """A callable for `model.generate(..., custom_generate=...)` that uses `manager`; see `GenerationManager.bind`."""
    check_on_unsupported(on_unsupported)
    return partial(generate, manager=manager, bound=Bound(streamer, tokenizer, seed, on_unsupported))


# Names of our arguments that `model.generate` does not have.
_OWN_NAMES = frozenset(inspect.signature(generate).parameters) - {
    *inspect.signature(GenerationMixin.generate).parameters,
    *("input_ids", "tokenizer", "stop_strings", "inputs_tensor"),
}


def _directly(model: PreTrainedModel, arguments: dict[str, Any], settings: CallSettings) -> GenerateOutput:
    """Let `model.generate` prepare the call, as for any `custom_generate`, without arguments that it would lose."""
    if arguments.pop("custom_generate", None) not in (None, generate):
        raise ValueError("`custom_generate` makes no sense here: this function is the custom generate")
    # None means "not given" only for named parameters and for pictures: as a field (eos_token_id=None) it is a value.
    named = {*inspect.signature(generate).parameters, *inspect.signature(GenerationMixin.generate).parameters, *MEDIA}
    given = {name: value for name, value in arguments.items() if value is not None or name not in named}
    if "inputs" in given and "input_ids" in given:
        raise ValueError("pass either `inputs` or `input_ids`, not both")
    raw = dict(given)
    for name in ("streamer", "tokenizer", "stop_strings"):
        if getattr(settings, name) is not None:
            raw[name] = getattr(settings, name)
    transformers_model: Any = model
    calls: list[PreparedCall] = []

    def prepared(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> GenerateOutput:
        calls.append(
            PreparedCall(
                model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, media_of(given)
            )
        )
        return serve(calls[-1], settings)

    with _ending(settings):
        try:
            _refuse_arguments(given.pop("assistant_model", None), given.pop("synced_gpus", None))
            given.pop("assistant_tokenizer", None)
            if settings.plain:
                raise_if_refused(model)
            refuse_unservable(model)  # before its preparation runs in vain
            _refuse_token_healing(transformers_model, given)
            _take_stop_strings(transformers_model, given, settings)
            _check_media(model, given, settings)
            out: GenerateOutput = transformers_generate(transformers_model)(custom_generate=prepared, **given)
            return out
        except (UnsupportedArgumentError, UnsupportedModelError) as error:
            if not settings.plain or any(call.submitted for call in calls):
                _raise_naming(error, media_of(given))
            note(model, error, settings.seed, calls[-1].config if calls else None)
        except ReentrantCallError as error:
            if calls[-1].bound_to_engine:
                raise
            note(model, error, settings.seed, calls[-1].config)
        plain: GenerateOutput = transformers_generate(transformers_model)(**raw)
        return plain


def _check_media(model: PreTrainedModel, given: dict[str, Any], settings: CallSettings) -> None:
    """Refuse pictures that the model's engine does not serve before transformers runs the towers."""
    media, input_ids = media_of(given), given.get("input_ids")
    if media and isinstance(input_ids, torch.Tensor):
        manager = settings.manager
        manager = manager if manager is not None else get_manager(model, settings.batching_config)
        names = ("attention_mask", "position_ids", *TOKEN_TYPES)
        arguments = {name: given[name] for name in names if given.get(name) is not None}
        if not manager.is_here:
            manager.media.check(input_ids, arguments, user_name(media))


def _raise_naming(error: UnsupportedArgumentError | UnsupportedModelError, media: list[str]) -> NoReturn:
    """Raise a refusal; one of a model names the picture's argument too, which may be the reason why it was called."""
    if media and isinstance(error, UnsupportedModelError):
        raise UnsupportedModelError(f"`{user_name(media)}` is not served: {error}") from error
    raise error


def _refuse_token_healing(model: Any, given: dict[str, Any]) -> None:
    """Refuse `token_healing` here: transformers would require the tokenizer, which the call leaves out."""
    configs = (given.get("generation_config"), model.generation_config)
    values = [given.get("token_healing"), *[getattr(config, "token_healing", None) for config in configs]]
    if next((value for value in values if value is not None), False):
        raise UnsupportedArgumentError("`token_healing=True` is not served; use plain `model.generate` for this call")


def _take_stop_strings(model: Any, given: dict[str, Any], settings: CallSettings) -> None:
    """Remove `stop_strings` from the call: transformers would require the tokenizer, which it does not pass on."""
    config: GenerationConfig | None = given.get("generation_config")
    if settings.stop_strings is None:
        settings.stop_strings = getattr(config, "stop_strings", None)
    of_model = model.generation_config.stop_strings
    if settings.stop_strings is None:
        settings.stop_strings = of_model
    if config is not None and config.stop_strings is not None:
        given["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    if of_model is not None:
        given["stop_strings"] = None  # unlike a config field, it overrides the model's own setting


def _in_place(call: PreparedCall, settings: CallSettings, inputs_tensor: torch.Tensor | None) -> GenerateOutput:
    """Serve a call of `model.generate` that reached us as its `custom_generate`."""
    with _ending(settings):
        caller = read_caller_frame()
        if caller.streamer is not None and settings.streamer is not None and caller.streamer is not settings.streamer:
            caller.streamer.end()
            raise ValueError("two different streamers: one is bound, the other was given to `generate`; pass only one")
        # transformers has already shown the prompt to a streamer that was passed to `generate`.
        settings.prompt_shown = caller.streamer is not None
        settings.streamer = caller.streamer if caller.streamer is not None else settings.streamer
        settings.tokenizer = caller.tokenizer if caller.tokenizer is not None else settings.tokenizer
        call.media_names = media_of(caller.original or {})
        try:
            _refuse_arguments(caller.assistant_model, caller.synced_gpus)
            if settings.plain:
                raise_if_refused(call.model)
            return serve(call, settings)
        except (UnsupportedArgumentError, UnsupportedModelError) as error:
            if not settings.plain or call.submitted:
                _raise_naming(error, call.media_names)
            note(call.model, error, settings.seed, call.config)
        except ReentrantCallError as error:
            if call.bound_to_engine:
                raise
            note(call.model, error, settings.seed, call.config)
        return _decode_plainly(call, settings, caller, inputs_tensor)


def _decode_plainly(
    call: PreparedCall, settings: CallSettings, caller: CallerArguments, inputs_tensor: torch.Tensor | None
) -> GenerateOutput:
    if settings.streamer is not None and not settings.prompt_shown:
        settings.streamer.put(call.input_ids.cpu())  # type: ignore[no-untyped-call]
    out: GenerateOutput = decode_plainly(
        call.model,
        call.input_ids,
        call.processors,
        with_stop_strings(call.criteria, settings),
        call.config,
        call.model_kwargs,
        inputs_tensor=inputs_tensor,
        caller=caller,
        tokenizer=settings.tokenizer,
        streamer=settings.streamer,
        own_names=_OWN_NAMES,
    )
    return out


@contextlib.contextmanager
def _ending(settings: CallSettings) -> Iterator[None]:
    """End the streamer if the call fails: a reader in another thread waits for the end in any case."""
    try:
        yield
    except BaseException:
        if settings.streamer is not None and not settings.ended:
            settings.streamer.end()  # type: ignore[no-untyped-call]
        raise


def _refuse_arguments(assistant_model: Any, synced_gpus: Any) -> None:
    if assistant_model is not None:
        raise UnsupportedArgumentError("`assistant_model` is not served; use plain `model.generate` for this call")
    if synced_gpus:
        raise UnsupportedArgumentError("`synced_gpus` is not served; use plain `model.generate` for this call")
