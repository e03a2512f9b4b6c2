"""Arguments of `model.generate` that transformers does not pass on to a `custom_generate` callable."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import FrameType
from typing import Any

from transformers import GenerationMixin

from hf_async_batching.errors import UnsupportedArgumentError

_NAMES = ("streamer", "assistant_model", "synced_gpus")


@dataclass(frozen=True, slots=True)
class CallerArguments:
    """Arguments of the call of `generate` that is being served.

    Attributes:
        streamer: It has seen the prompt already.
        assistant_model: As given.
        synced_gpus: As given.
        tokenizer: As given; None where the whole call could not be seen.
        assistant_tokenizer: As given; None where the whole call could not be seen.
        original: All keyword arguments of the call, and the positional ones behind `self` by their names; None where
            they could not be seen.
    """

    streamer: Any = None
    assistant_model: Any = None
    synced_gpus: Any = None
    tokenizer: Any = None
    assistant_tokenizer: Any = None
    original: dict[str, Any] | None = None


def read_caller_frame() -> CallerArguments:
    """Read the arguments from the frame of `GenerationMixin.generate` that has called, on this thread's stack.

    transformers shows a streamer the prompt, and neither tokens nor the end: without this its reader would hang.

    Raises:
        UnsupportedArgumentError: There is no such frame, so that arguments may have been lost.
    """
    frame = inspect.currentframe()
    try:
        # The nearest one is the one that called: wrappers of the user's may stand between. Found by its origin, not
        # through the class: `generate` may be wrapped by other libraries.
        while frame is not None and not _is_generate(frame):
            frame = frame.f_back
        if frame is None or not all(name in frame.f_locals for name in _NAMES):
            raise UnsupportedArgumentError(
                "hf_async_batching.generate got a prepared call without `model.generate` on this thread's stack: "
                "`streamer`, `tokenizer`, `assistant_model` and `synced_gpus` would be lost; call "
                "hf_async_batching.generate(model, ...) with the arguments of `model.generate` instead"
            )
        seen = {name: frame.f_locals[name] for name in _NAMES}
        original = _original_call(frame)
        given = original or {}
        return CallerArguments(
            **seen,
            tokenizer=given.get("tokenizer"),
            assistant_tokenizer=given.get("assistant_tokenizer"),
            original=original,
        )
    finally:
        del frame


def _is_generate(frame: FrameType) -> bool:
    return frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == GenerationMixin.__module__


def _original_call(frame: FrameType) -> dict[str, Any] | None:
    """Arguments of the wrapper that `torch.no_grad` puts around `generate`: its own dictionary of them is whole."""
    wrapper = frame.f_back
    if wrapper is None or wrapper.f_code.co_name != "decorate_context":
        return None
    positional, named = wrapper.f_locals.get("args"), wrapper.f_locals.get("kwargs")
    if not isinstance(positional, tuple) or not isinstance(named, dict):
        return None
    names = frame.f_code.co_varnames[1 : len(positional)]
    return {**dict(zip(names, positional[1:])), **named}
