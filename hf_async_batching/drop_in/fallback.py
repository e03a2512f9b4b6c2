"""`on_unsupported="generate"`: pass a call that the engine does not serve to plain `model.generate`, unchanged."""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GENERATION_MODES_MAPPING

from hf_async_batching.drop_in.caller_frame import CallerArguments
from hf_async_batching.errors import HfAsyncBatchingError, UnsupportedArgumentError, UnsupportedModelError
from hf_async_batching.model.view.snapshot import ModelSnapshot
from hf_async_batching.model.view.unwrap import transformers_generate, unwrap

logger = logging.getLogger(__name__)

OnUnsupported = Literal["error", "generate"]

# Why a model was refused, and in which state. Finding out again would take a forward, or a whole engine.
_refused: weakref.WeakKeyDictionary[PreTrainedModel, tuple[str, ModelSnapshot]] = weakref.WeakKeyDictionary()


def check_on_unsupported(value: Any) -> None:
    """Refuse any other value of `on_unsupported`.

    Raises:
        ValueError: `value` is neither "error" nor "generate".
    """
    if value not in ("error", "generate"):
        raise ValueError(f'`on_unsupported` must be "error" or "generate", got {value!r}')


def raise_if_refused(model: PreTrainedModel) -> None:
    """Refuse a model at once if it was refused in its present state; its calls then go to plain `generate`.

    Raises:
        UnsupportedModelError: With the earlier reason.
    """
    refused = _refused.get(model)
    if refused is None:
        return
    reason, state = refused
    if state == _state(model):
        raise UnsupportedModelError(reason)
    _refused.pop(model, None)


def note(model: PreTrainedModel, error: HfAsyncBatchingError, seed: Any, config: GenerationConfig | None) -> None:
    """Log why a call goes to plain `generate`, once per reason.

    Raises:
        UnsupportedArgumentError: The call has a `seed`, which plain `generate` would ignore.
    """
    if seed is not None and (config is None or config.do_sample):
        raise UnsupportedArgumentError(
            f"`seed` cannot be kept by plain `model.generate`, which this call needs ({error}); leave `seed` out"
        ) from error
    state = _state(model) if isinstance(error, UnsupportedModelError) else None
    if state is not None:
        _refused[model] = str(error), state
    _warn_once(type(model).__name__, str(error))


def _state(model: PreTrainedModel) -> ModelSnapshot | None:
    """A snapshot of the model now; None if the snapshot itself refuses the model."""
    try:
        return ModelSnapshot.of(unwrap(model))
    except HfAsyncBatchingError:
        return None


@functools.lru_cache(maxsize=256)
def _warn_once(name: str, reason: str) -> None:
    logger.warning("a call on %s goes to plain `model.generate`: %s", name, reason)


def decode_plainly(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *,
    inputs_tensor: torch.Tensor | None,
    caller: CallerArguments,
    tokenizer: Any,
    streamer: BaseStreamer | None,
    own_names: frozenset[str],
) -> Any:
    """Decode as `model.generate` would have without `custom_generate`, from the point at which it called us.

    `generate` has already expanded rows by beams, and made processors and criteria.

    Args:
        model: The model.
        input_ids: Prepared and expanded prompts.
        processors: Prepared processors.
        criteria: Prepared criteria.
        config: Prepared config.
        model_kwargs: Inputs of the model's forward.
        inputs_tensor: The main input of `generate`.
        caller: Arguments that `generate` did not pass on.
        tokenizer: The caller's tokenizer.
        streamer: The caller's streamer; it has seen the prompt.
        own_names: Names of our arguments, which `generate` does not have.

    Raises:
        UnsupportedArgumentError: The decoding method lives in a repository, and the whole call could not be read.
    """
    transformers_model: Any = model
    mode = config.get_generation_mode(caller.assistant_model)
    target = GENERATION_MODES_MAPPING[mode]
    if "/" in target:
        # A decoding method that moved out of transformers: its code takes a call's raw arguments and prepares them
        # itself.
        if caller.original is None:
            raise UnsupportedArgumentError(
                f"{mode} is not served, and the arguments of `model.generate` could not be read; leave out "
                "`custom_generate` for this call"
            )
        raw = {k: v for k, v in caller.original.items() if k != "custom_generate" and k not in own_names}
        if streamer is not None:
            raw["streamer"] = _PromptShown(streamer)
        return transformers_generate(transformers_model)(**raw)
    given = {"tokenizer": tokenizer, "assistant_tokenizer": caller.assistant_tokenizer}
    arguments = transformers_model._extract_generation_mode_kwargs(
        None, given, caller.synced_gpus, caller.assistant_model, streamer
    )
    transformers_model._validate_generation_mode(mode, config, arguments)
    method = getattr(type(model), target)
    if "inputs_tensor" in inspect.signature(method).parameters:
        arguments["inputs_tensor"] = inputs_tensor
    return method(
        model,
        input_ids,
        logits_processor=processors,
        stopping_criteria=criteria,
        generation_config=config,
        **arguments,
        **model_kwargs,
    )


class _PromptShown(BaseStreamer):
    """A streamer that has seen the prompt, for a second `generate` that would show it again."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self._streamer = streamer
        self._shown = False

    def put(self, value: torch.Tensor) -> None:
        if self._shown:
            self._streamer.put(value)  # type: ignore[no-untyped-call]
        self._shown = True

    def end(self) -> None:
        self._streamer.end()  # type: ignore[no-untyped-call]
