"""Check what one engine can serve: a request's tokens, lengths and numbers, a group's rows and pages, embeddings."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_async_batching.checks.embeddings_check import check_embeddings, check_takes_embeddings
from hf_async_batching.core.logits_params import FIELDS_OF_KIND
from hf_async_batching.core.request import Request
from hf_async_batching.core.row_layout import MAX_EOS, RuleKind
from hf_async_batching.core.row_record import check_encodable
from hf_async_batching.engine.builder import EngineParts
from hf_async_batching.errors import RequestTooLongError, UnsupportedArgumentError
from hf_async_batching.inputs.prompts import MediaInputs
from hf_async_batching.runtime.forking import ForkSafeLock


def check_limits(request: Request, parts: EngineParts) -> None:
    """Refuse a request that an engine cannot serve.

    Raises:
        TypeError: A token is not an integer.
        ValueError: The request names a token that the model does not have, or holds a number out of the tables' range.
        UnsupportedArgumentError: The request is longer than the length up to which the model's rotary frequencies are
            the same for all rows.
        RequestTooLongError: The prompt and the new tokens exceed the limit of a request, or the cache.
        UnsupportedArgumentError: The request has more end-of-sequence tokens than its rules can hold.
    """
    vocab, limit = parts.forward.vocab_size, parts.config.max_sequence_length
    _check_tokens("input_ids", request.prompt, vocab)
    if request.padding:
        # Padding is not looked up in the embedding, but entered in tables as wide as the logits.
        _check_tokens("padding", request.padding, max(vocab, parts.forward.logit_size))
    if request.min_new_tokens and len(request.eos_token_ids) > MAX_EOS:
        raise UnsupportedArgumentError(
            f"`min_new_tokens` with more than {MAX_EOS} end-of-sequence tokens is not served here "
            f"(got {len(request.eos_token_ids)}); use `submit`, or pass fewer `eos_token_id`s"
        )
    logits = parts.forward.logit_size
    for rule in request.logits.rules:
        beyond = [token for token in (*rule.prefix, rule.token) if token >= logits]
        if beyond and rule.kind is not RuleKind.SUPPRESS:
            raise ValueError(
                f"`{FIELDS_OF_KIND[rule.kind]}` names token ids {beyond}, outside of the model's vocabulary of "
                f"{logits} tokens"
            )
    if request.chooser is not None and request.group is None:
        _check_indexed(request.chooser, logits)
    length = len(request.prompt)
    if parts.rope_limit is not None and length + request.max_new_tokens > parts.rope_limit:
        remedy = "shorten the prompt" if length >= parts.rope_limit else "lower `max_new_tokens`"
        raise UnsupportedArgumentError(
            f"the prompt of {length} tokens and `max_new_tokens={request.max_new_tokens}` go beyond the "
            f"{parts.rope_limit} tokens up to which the rotary frequencies of {parts.forward.name} are the same "
            f'for all rows of a batch; {remedy}, or pass on_unsupported="generate", or use plain `model.generate`'
        )
    if length + request.max_new_tokens > limit:
        settings = parts.config.settings
        by_context = limit == settings.max_sequence_length
        bound = f"the limit of {limit} tokens per request" if by_context else f"the whole KV cache of {limit} tokens"
        remedy = "shorten the prompt or " if length >= limit else "lower `max_new_tokens` or "
        remedy += (
            "raise BatchingConfig(max_sequence_length=...)" if by_context else "raise BatchingConfig(num_pages=...)"
        )
        raise RequestTooLongError(
            f"the prompt of {length} tokens and {request.max_new_tokens} new tokens exceed {bound}; {remedy}"
        )
    check_encodable(request)


# Processors of transformers that index the scores by token ids, and the fields that hold these ids.
_INDEXING = {
    "ForcedBOSTokenLogitsProcessor": ("forced_bos_token_id", "bos_token_id"),
    "ForcedEOSTokenLogitsProcessor": ("forced_eos_token_id", "eos_token_id"),
    "ExponentialDecayLengthPenalty": ("eos_token_id", "eos_token_id"),
}


def _check_indexed(chooser: Any, vocab: int) -> None:
    """Refuse tokens outside the scores if called processors index the scores by them: a GPU may fail at that."""
    for processor in getattr(chooser, "processors", ()):
        field, attribute = _INDEXING.get(type(processor).__name__, ("", ""))
        if field:
            tokens = torch.as_tensor(getattr(processor, attribute)).flatten().tolist()
            beyond = [token for token in tokens if not -vocab <= token < vocab]
            if beyond:
                raise ValueError(f"`{field}` names token ids {beyond}, outside of the vocabulary of {vocab} tokens")


def _check_tokens(name: str, tokens: tuple[int, ...], vocab: int) -> None:
    try:
        ids = np.array(array("q", tokens))
    except TypeError as error:
        raise TypeError(f"`{name}` must hold only integers: {error}") from error
    except OverflowError:
        ids = np.array([token if 0 <= token < vocab else -1 for token in tokens])
    wrong = (ids < 0) | (ids >= vocab)
    if wrong.any():
        token = tokens[int(wrong.argmax())]
        raise ValueError(f"`{name}` holds token id {token}, outside of the model's vocabulary of {vocab} tokens")


def check_group(requests: list[Request], parts: EngineParts) -> None:
    """Refuse rows that advance together but do not fit in the engine together.

    Raises:
        ValueError: A processor of the rows names a token that the model does not have.
        UnsupportedArgumentError: The rows need more rows or pages than the engine has.
    """
    _check_indexed(requests[0].chooser, parts.forward.logit_size)
    if not group_fits(requests, parts):
        most = parts.config.max_rows
        raise UnsupportedArgumentError(
            f"`logits_processor`: {len(requests)} rows are computed in lockstep, because a processor may look at the "
            f"whole batch, and the engine cannot hold them together (at most {most} rows, and their pages); pass "
            "fewer rows per call, raise BatchingConfig(max_rows=..., num_pages=...), or set `row_wise = True` on a "
            "processor that looks at each row independently"
        )


def group_fits(requests: list[Request], parts: EngineParts) -> bool:
    """Whether an engine can hold the requests at the same time, up to their last tokens."""
    pages = parts.engine.scheduler.pages
    needed = sum([pages.pages_for(len(request.prompt) + request.max_new_tokens) for request in requests])
    return len(requests) <= parts.config.max_rows and needed <= pages.size


class EmbeddingsIntake:
    """Moves prompt embeddings to an engine's device, after a check that its model takes embeddings."""

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._checked: Callable[[], EngineParts | None] = lambda: None

    def bring(self, requests: list[Request], parts: EngineParts, model: PreTrainedModel) -> list[Request]:
        """Return the requests with their embeddings on the engine's device.

        Args:
            requests: Requests, with or without embeddings.
            parts: The engine. Its first request with embeddings triggers the model's check.
            model: The model that the engine serves.

        Raises:
            ValueError: The embeddings' shape or dtype does not fit the model.
            UnsupportedModelError: The model takes no embeddings.
        """
        if not any([request.prompt_embeddings is not None for request in requests]):
            return requests
        forward = parts.forward
        brought: list[Request] = []
        for request in requests:
            embeddings: Any = request.prompt_embeddings
            if embeddings is not None:
                check_embeddings(MediaInputs.of(embeddings).embeddings, len(request.prompt), forward)
                embeddings = embeddings.to(forward.device)
            brought.append(replace(request, prompt_embeddings=embeddings))
        self.check(parts, model)
        return brought

    def check(self, parts: EngineParts, model: PreTrainedModel) -> None:
        """Check once for each engine whether its model takes embeddings.

        Raises:
            UnsupportedModelError: The model takes no embeddings.
        """
        with self._lock:
            if self._checked() is not parts:
                check_takes_embeddings(model, parts.forward)
                self._checked = weakref.ref(parts)
