"""Read arguments of `model.generate` that transformers does not pass on to a `custom_generate` callable."""

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
    """Arguments of the current `generate` call.

    Attributes:
        streamer: The streamer; it has already seen the prompt.
        assistant_model: The argument.
        synced_gpus: The argument.
        tokenizer: The argument; None if the whole call could not be read.
        assistant_tokenizer: The argument; None if the whole call could not be read.
        original: All keyword arguments of the call, and the positional ones after `self` by name; None if they could
            not be read.
    """

    streamer: Any = None
    assistant_model: Any = None
    synced_gpus: Any = None
    tokenizer: Any = None
    assistant_tokenizer: Any = None
    original: dict[str, Any] | None = None


def read_caller_frame() -> CallerArguments:
    """Read the arguments from the frame of the calling `GenerationMixin.generate`, on this thread's stack.

    transformers shows a streamer the prompt, but neither tokens nor the end: without them its reader would hang.

    Raises:
        UnsupportedArgumentError: There is no such frame, so arguments may be lost.
    """
    frame = inspect.currentframe()
    try:
        # The nearest frame is the caller; wrappers of the user may lie between. It is found by its file and not
        # through the class, because other libraries may wrap `generate`.
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
    """Arguments of the wrapper that `torch.no_grad` puts around `generate`; its dictionary is complete."""
    wrapper = frame.f_back
    if wrapper is None or wrapper.f_code.co_name != "decorate_context":
        return None
    positional, named = wrapper.f_locals.get("args"), wrapper.f_locals.get("kwargs")
    if not isinstance(positional, tuple) or not isinstance(named, dict):
        return None
    names = frame.f_code.co_varnames[1 : len(positional)]
    return {**dict(zip(names, positional[1:])), **named}
