"""Build a `Request` from a prompt, a prepared `GenerationConfig` and a `SamplingSpec`; read seeds and end tokens."""

from __future__ import annotations

import itertools
import math
import operator
import os
import secrets
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, SupportsIndex

import numpy as np
import torch
from transformers import GenerationConfig

from hf_async_batching.core.request import DEFAULT_NGRAM, MAX_SEED, Request
from hf_async_batching.errors import UnsupportedArgumentError
from hf_async_batching.inputs.logits_processors import SamplingSpec

# Odd, so that successive rows of one seed never coincide; the constant is 2**63 divided by the golden ratio.
_SEED_STRIDE = 0x4F1BBCDCBFA53E0B

_counter = itertools.count()


def new_request_id() -> str:
    """An id that is unique in this process."""
    return f"req-{os.getpid()}-{next(_counter)}"


Seed = SupportsIndex | torch.Generator


def seeds_of_rows(seed: Any, rows: int) -> list[int]:
    """One seed per sequence of a call.

    Args:
        seed: One seed for the call, from which the seed of each row follows; or one per row, in a sequence, an array
            or a tensor. A seed is an integer of Python, numpy or torch, or a generator from which one number is drawn.
            None draws seeds from the system's entropy.
        rows: Sequences.

    Raises:
        TypeError: A seed is not an integer.
        ValueError: A seed is out of range, or the number of seeds differs from the number of rows.
    """
    if isinstance(seed, (torch.Tensor, np.ndarray)) and seed.ndim:
        seed = list(seed)
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != rows:
            raise ValueError(f"`seed` has {len(seed)} entries for {rows} sequences")
        return [_number(one) for one in seed]
    if seed is None:
        return [secrets.randbelow(MAX_SEED) for _ in range(rows)]
    first = _number(seed)
    return [(first + row * _SEED_STRIDE) % MAX_SEED for row in range(rows)]


def _number(seed: Seed) -> int:
    if isinstance(seed, torch.Generator):
        drawn = torch.randint(0, MAX_SEED - 1, (), generator=seed, device=seed.device)
        return int(drawn)
    try:
        number = operator.index(seed)  # also accepts numpy's integers and tensors with one element
    except TypeError as error:
        raise TypeError(
            f"`seed` must be an integer, a `torch.Generator`, or one of these per sequence; got {seed!r}"
        ) from error
    if not 0 <= number < MAX_SEED:
        raise ValueError(f"`seed` must be in [0, 2**63), got {number}")
    return number


def build_request(
    tokens: Iterable[int],
    config: GenerationConfig,
    spec: SamplingSpec,
    *,
    max_new_tokens: float,
    request_id: str | None = None,
) -> Request:
    """Make a request.

    Args:
        tokens: Token ids of the prompt.
        config: Prepared config (with its defaults) that `check_fields` has checked.
        spec: The parameters of its processors.
        max_new_tokens: Maximum resolved from `max_new_tokens` and `max_length`.
        request_id: The caller's id, or None to make one.

    Raises:
        ValueError: A field is out of range.
    """
    if config.do_sample and config.top_p is not None and not 0.0 <= config.top_p <= 1.0:
        # transformers would treat a value above 1 as 1.
        raise ValueError(f"`top_p` must be in [0, 1], got {config.top_p}")
    returned = bool(config.return_dict_in_generate)
    return Request(
        request_id=request_id or new_request_id(),
        prompt=tuple(tokens),
        # `generate` accepts fractions, and stops at the first length that is not below them.
        max_new_tokens=math.ceil(max_new_tokens),
        min_new_tokens=spec.min_new_tokens,
        eos_token_ids=eos_token_ids(config),
        sampling=spec.sampling,
        logits=spec.logits,
        padding=spec.padding,
        chooser=spec.chooser,
        output_scores=returned and bool(config.output_scores),
        output_logits=returned and bool(config.output_logits),
        lookup_tokens=_at_least_one(config, "prompt_lookup_num_tokens", 0),
        lookup_ngram=_at_least_one(config, "max_matching_ngram_size", DEFAULT_NGRAM),
    )


def check_history(request: Request) -> None:
    """Refuse a request that has only embeddings and whose logits depend on earlier tokens.

    Raises:
        UnsupportedArgumentError: The logits depend on the history, in which the engine would count the placeholders.
    """
    if request.logits.needs_seen or request.logits.needs_memory:
        raise UnsupportedArgumentError(
            "`inputs_embeds` is not served together with penalties, n-grams or biases, whose "
            "history has no prompt then; leave these out, or use plain `model.generate` for this call"
        )


def _at_least_one(config: GenerationConfig, name: str, default: int) -> int:
    value = getattr(config, name)
    if value is None:
        return default
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, or None, got {value!r}")
    return value


def eos_token_ids(config: GenerationConfig) -> tuple[int, ...]:
    """The end-of-sequence tokens of a config, as a tuple.

    Raises:
        TypeError: A token is not an integer.
        ValueError: A token has more than 64 bits.
    """
    eos = config.eos_token_id
    if eos is None:
        return ()
    if isinstance(eos, torch.Tensor):
        eos = eos.tolist()
    tokens = tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    for token in tokens:
        if not isinstance(token, Integral):
            raise TypeError(f"`eos_token_id` must be an integer or a list of integers, got {token!r}")
        if not -MAX_SEED <= token < MAX_SEED:  # type: ignore[operator]
            raise ValueError(f"`eos_token_id` must hold 64-bit integers, got {token}")
    return tuple(int(token) for token in tokens)
