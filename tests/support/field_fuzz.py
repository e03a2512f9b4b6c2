"""Odd values of every field, beside a request that must not notice.

Each value is tried through `submit` and through the drop-in. It is served with the tokens of plain `generate`, or
refused with an error that names the field; and the other request's tokens are what they are alone.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_async_batching import GenerationManager, HfAsyncBatchingError
from hf_async_batching.errors import EngineClosedError, EngineFailedError, InvalidProbabilitiesError, QueueFullError
from hf_async_batching.inputs.compatibility import FIELDS
from hf_async_batching.inputs.generation_fields import INSTALLED

PROMPT = [5, 6, 7, 5, 6, 8, 9, 5, 6]
VICTIM = [11, 12, 13]
NEW = 4
MOST_SECONDS = 5.0

_ODD: tuple[Any, ...] = (2**31, 2**40, -1, 0, math.nan, 1e39, [], object(), "text", {})
_NUMBERS = _ODD[:6]

# Fields that hold lists: the odd value inside of one.
_INSIDE: dict[str, Any] = {
    "eos_token_id": (lambda x: [3, x],),
    "suppress_tokens": (lambda x: [x],),
    "begin_suppress_tokens": (lambda x: [x],),
    "forced_eos_token_id": (lambda x: [x],),
    "bad_words_ids": (lambda x: [[x]], lambda x: [[5, x]], lambda x: [[x, 6]]),
    "sequence_bias": (lambda x: [[[x], 1.0]], lambda x: [[[5, x], 1.0]], lambda x: [[[5], x]], lambda x: {(5,): x}),
    "exponential_decay_length_penalty": (lambda x: (x, 1.5), lambda x: (1, x)),
    "stop_strings": (lambda x: [x],),
}

# One value each that no other kind is like.
_SPECIAL: tuple[tuple[str, Any], ...] = (
    ("no_repeat_ngram_size", 10_000),
    ("encoder_no_repeat_ngram_size", 10_000),
    ("bad_words_ids", [[]]),
    ("bad_words_ids", [[30, 31 + i % 40, i % 90] for i in range(100_000)]),
    ("sequence_bias", {(1 + i % 90, i // 90 % 90): 1.0 for i in range(5_000)}),
    ("suppress_tokens", list(range(2**31, 2**31 + 10_000))),
    ("temperature", 1e-39),
    ("temperature", 1e-42),
    ("repetition_penalty", 1e-46),
    ("top_p", 0.0),
    ("top_k", 2**70),
    ("eos_token_id", [2**70]),
    ("eos_token_id", 1.5),
    ("suppress_tokens", [2**62, 5]),
    ("max_new_tokens", math.inf),
    ("max_length", math.inf),
)

# What a message may call a field.
_ALIASES = {
    "max_length": ("max_new_tokens",),
    "max_new_tokens": ("max_length",),
    "min_length": ("min_new_tokens",),
    "exponential_decay_length_penalty": ("decay_",),
    "forced_bos_token_id": ("forced_eos_token_id", "bos_token_id"),
    "num_return_sequences": ("num_beams",),
}

# What `generate` reads them for has no place in `submit`.
_OF_A_BATCH = {"pad_token_id", "bos_token_id", "top_k"}
_NO_EFFECT = {name for name, entry in FIELDS.items() if entry.status == "no effect"}

# The call never ends, or takes the machine's memory: what plain `generate` does is not asked.
_ENDLESS = {"max_length", "max_new_tokens", "num_return_sequences"}


@dataclass
class Counts:
    """What came of the values.

    Attributes:
        tried: Submissions.
        served: Those that were served, with the tokens of plain `generate` where that is certain.
        refused: By class of error.
        hurt: Victims whose tokens changed.
        faults: What should not be, in words.
    """

    tried: int = 0
    served: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    hurt: int = 0
    slowest: tuple[float, str] = (0.0, "")
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        refused = ", ".join(f"{name} {count}" for name, count in self.refused.most_common())
        return (
            f"tried {self.tried}, served {self.served}, refused {self.refused.total()} ({refused}), "
            f"victims hurt {self.hurt}, slowest {self.slowest[0]:.2f} s ({self.slowest[1]}), faults {len(self.faults)}"
        )


def cases(fields: tuple[str, ...] = INSTALLED) -> Iterator[tuple[str, Any]]:
    """Fields and values."""
    for name in fields:
        yield from ((name, value) for value in _ODD)
        yield from ((name, wrap(value)) for wrap in _INSIDE.get(name, ()) for value in (*_NUMBERS, "text", object()))
    yield from ((name, value) for name, value in _SPECIAL if name in fields)


def fuzz(
    model: PreTrainedModel, manager: GenerationManager, fields: tuple[str, ...] = INSTALLED, *, thin: bool = False
) -> Counts:
    """Try every value of the fields on both ways into the engine, drawn and not.

    Args:
        model: A tiny one.
        manager: Of it.
        fields: Their names.
        thin: One way for each value, in turn, and few values of fields that do nothing here.
    """
    counts, alone = Counts(), _plain(model, VICTIM, max_new_tokens=_VICTIM_NEW)
    victim = manager.submit(VICTIM, max_new_tokens=_VICTIM_NEW, **_GREEDY)
    ways = [(way, drawn) for way in (_submitted, _dropped_in) for drawn in (False, True)]
    for i, (name, value) in enumerate(cases(fields)):
        if thin and (name not in FIELDS or FIELDS[name].status != "honoured") and i % 3:
            continue
        for way, drawn in ways[i % 4 : i % 4 + 1] if thin else ways:
            _try(model, manager, way, name, value, {**_arguments(name, drawn), name: value}, counts)
        if victim.done:
            counts.hurt += victim.result(60).token_ids != alone
            victim = manager.submit(VICTIM, max_new_tokens=_VICTIM_NEW, **_GREEDY)
    counts.hurt += victim.result(60).token_ids != alone
    return counts


_GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
_VICTIM_NEW = 200


def _arguments(name: str, drawn: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 3, "pad_token_id": 0}
    if drawn or name == "do_sample":  # from one token, so that it is known which
        arguments |= {"do_sample": True, "top_k": 1}
    if name == "max_length":
        del arguments["max_new_tokens"]
    return arguments


def _try(
    model: PreTrainedModel, manager: GenerationManager, way: Any, name: str, value: Any, arguments: Any, counts: Counts
) -> None:
    listed = name == "encoder_no_repeat_ngram_size" and value in (2**31, 2**40)
    if way is _dropped_in and listed:
        return  # transformers makes a list of as many before it calls anything
    what = f"{way.__name__[1:]} {name}={_short(value)} do_sample={arguments['do_sample']}"
    counts.tried += 1
    began = time.perf_counter()
    tokens: list[int] | None = None
    try:
        tokens = _quietly(way, model, manager, arguments)
    except Exception as error:
        counts.refused[type(error).__name__] += 1
        good = _is_a_good_refusal(error, name)
        if isinstance(error, InvalidProbabilitiesError):  # names no field: `generate` must not be able to draw either
            good = _has_no_distribution(model, {**arguments, name: 10_000} if listed else arguments)
        if not good:
            counts.faults.append(f"{what}: {type(error).__name__}: {str(error)[:160]}")
    seconds = time.perf_counter() - began
    counts.slowest = max(counts.slowest, (seconds, what))
    if seconds > MOST_SECONDS:
        counts.faults.append(f"{what}: {seconds:.1f} s")
    if tokens is None:
        return
    counts.served += 1
    if name in _ENDLESS or (name == "top_k" and arguments["do_sample"]):
        return
    try:
        expected = _quietly(_plain, model, PROMPT, **({**arguments, name: 10_000} if listed else arguments))
    except Exception as error:
        if _is_no_distribution(error) or name in _NO_EFFECT or (way is _submitted and name in _OF_A_BATCH):
            return
        counts.faults.append(f"{what}: served, and plain generate raises {type(error).__name__}: {str(error)[:160]}")
    else:
        if tokens != expected:
            counts.faults.append(f"{what}: {tokens}, expected {expected}")


def _submitted(model: PreTrainedModel, manager: GenerationManager, arguments: dict[str, Any]) -> list[int]:
    return list(manager.submit(PROMPT, seed=1, **arguments).result(60).token_ids)


def _dropped_in(model: PreTrainedModel, manager: GenerationManager, arguments: dict[str, Any]) -> list[int]:
    out: Any = model.generate(torch.tensor([PROMPT]), custom_generate=manager.bind(seed=1), **arguments)  # type: ignore[operator]
    return _new(out)


def _plain(model: PreTrainedModel, prompt: list[int], **arguments: Any) -> list[int]:
    out: Any = model.generate(torch.tensor([prompt]), **{**_GREEDY, **arguments})  # type: ignore[operator]
    return _new(out, len(prompt))


def _new(out: Any, length: int = len(PROMPT)) -> list[int]:
    tokens: list[int] = getattr(out, "sequences", out)[0, length:].tolist()
    return tokens


def _quietly(call: Any, *arguments: Any, **named: Any) -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.filterwarnings("ignore", module="transformers")
        return call(*arguments, **named)


def _is_a_good_refusal(error: Exception, name: str) -> bool:
    if isinstance(error, (EngineFailedError, EngineClosedError, QueueFullError)):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    ours = "/hf_async_batching/" in frames[-1].filename or isinstance(error, HfAsyncBatchingError)
    if not ours:  # transformers' own, or what torch says to it
        return any("/transformers/" in frame.filename for frame in frames)
    usual = isinstance(error, (ValueError, TypeError, HfAsyncBatchingError))
    return usual and any(one in str(error) for one in (name, *_ALIASES.get(name, ())))


def _has_no_distribution(model: PreTrainedModel, arguments: dict[str, Any]) -> bool:
    try:
        _quietly(_plain, model, PROMPT, **arguments)
    except Exception as error:
        return _is_no_distribution(error)
    return False


def _is_no_distribution(error: Exception) -> bool:
    """Whether plain `generate` says that it draws from what is no distribution."""
    return "probability tensor" in str(error)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
