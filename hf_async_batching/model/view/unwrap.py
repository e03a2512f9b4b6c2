"""Find the model inside the wrappers of PEFT, torch.compile and data parallelism."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from transformers import PreTrainedModel

from hf_async_batching.errors import UnsupportedModelError


def unwrap(model: Any) -> PreTrainedModel:
    """Return the transformers model inside `PeftModel`, `torch.compile(model)` and data parallel wrappers.

    Raises:
        UnsupportedModelError: There is no such model, it cannot generate, or a wrapper adds something that is not
            served.
    """
    given = model
    while not isinstance(model, PreTrainedModel):
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            if any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values()):
                raise _prompt_learning(type(model).__name__)
            model = model.get_base_model()
        else:
            raise UnsupportedModelError(
                f"`model` must be a transformers PreTrainedModel that can generate, got {type(given).__name__}"
            )
    if not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"`model` must be a transformers PreTrainedModel that can generate, got {type(given).__name__}"
        )
    return model


def check_call(model: PreTrainedModel) -> None:
    """Refuse what a wrapper has put onto the model for the current call.

    Raises:
        UnsupportedModelError: PEFT passes learned prompts in through `prepare_inputs_for_generation`, which the engine
            does not call.
    """
    own = vars(model).get("prepare_inputs_for_generation")
    if own is not None and getattr(own, "__self__", model) is not model:
        raise _prompt_learning(type(own.__self__).__name__)


def _prompt_learning(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is not served: it prepends learned prompts to every input. Use plain `model.generate` for it."
    )


def transformers_generate(model: Any) -> Callable[..., Any]:
    """Return transformers' own `generate` for a model, even if the object or the caller's subclass replaces it.

    The replacement may be this library, and a call that this library makes must not come back to it.
    """
    for base in type(model).__mro__:
        method: Any = base.__dict__.get("generate")
        if method is not None and str(method.__module__).startswith(("transformers.", "transformers_modules.")):
            return partial(method, model)
    own = getattr(type(model), "generate", None)  # a wrapper's, such as PEFT's; other wrappers look it up in the model
    return partial(own, model) if own is not None else model.generate
