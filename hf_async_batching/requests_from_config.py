"""From a prepared `GenerationConfig` to a `Request`: the one place that reads its fields."""

from __future__ import annotations

import itertools
import math
import os
import secrets
from collections.abc import Sequence as AbstractSequence

import torch
from transformers import GenerationConfig

from hf_async_batching.request import MAX_INT32, MAX_SEED, Request, SamplingParams

# Odd, so that successive rows of one seed never meet; the constant is 2**63 divided by the golden ratio.
_SEED_STRIDE = 0x4F1BBCDCBFA53E0B

_counter = itertools.count()


def new_request_id() -> str:
    """An id that is unique in this process."""
    return f"req-{os.getpid()}-{next(_counter)}"


def seed_of_row(seed: int | None, row: int) -> int:
    """The seed of the `row`-th sequence of a call; drawn from the system's entropy where `seed` is None.

    Raises:
        ValueError: `seed` is out of range.
    """
    if seed is None:
        return secrets.randbelow(MAX_SEED)
    if not 0 <= seed < MAX_SEED:
        raise ValueError(f"`seed` must be in [0, 2**63), got {seed}")
    return (seed + row * _SEED_STRIDE) % MAX_SEED


def build_request(
    prompt: AbstractSequence[int],
    config: GenerationConfig,
    *,
    max_new_tokens: int,
    min_new_tokens: int,
    seed: int,
    logprobs: bool = False,
    request_id: str | None = None,
) -> Request:
    """Make a request.

    Args:
        prompt: Token ids.
        config: Prepared (defaults are filled in) and checked by `check_fields`.
        max_new_tokens: Resolved from `max_new_tokens` and `max_length`.
        min_new_tokens: Resolved from `min_new_tokens` and `min_length`.
        seed: Of this request.
        logprobs: Whether log-probabilities are wanted.
        request_id: Given by the caller, or made here.

    Raises:
        ValueError: A field is out of its range.
    """
    eos = eos_token_ids(config)
    min_new_tokens = min_new_tokens if eos else 0
    sampling = SamplingParams(logprobs=logprobs)
    if config.do_sample:
        sampling = SamplingParams(
            do_sample=True,
            temperature=1.0 if config.temperature is None else float(config.temperature),
            top_k=min(int(config.top_k or 0), MAX_INT32),
            top_p=1.0 if config.top_p is None else float(config.top_p),
            min_p=float(config.min_p or 0.0),
            seed=seed,
            logprobs=logprobs,
        )
    return Request(
        request_id=request_id or new_request_id(),
        prompt=tuple(prompt),
        # `generate` takes fractions, and stops at the first length that is not below them.
        max_new_tokens=math.ceil(max_new_tokens),
        min_new_tokens=math.ceil(min_new_tokens),
        eos_token_ids=eos,
        sampling=sampling,
    )


def eos_token_ids(config: GenerationConfig) -> tuple[int, ...]:
    """The end-of-sequence tokens of a config, as a tuple."""
    eos = config.eos_token_id
    if eos is None:
        return ()
    if isinstance(eos, torch.Tensor):
        eos = eos.tolist()
    return tuple(int(token) for token in eos) if isinstance(eos, (list, tuple)) else (int(eos),)
