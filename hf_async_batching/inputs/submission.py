"""What `GenerationManager.submit` is given: read, and checked against an engine's limits."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria

from hf_async_batching.core.field_checks import check_real
from hf_async_batching.core.logits_params import FIELDS_OF_KIND
from hf_async_batching.core.request import Request
from hf_async_batching.core.row_layout import MAX_EOS, RuleKind
from hf_async_batching.core.row_record import check_encodable
from hf_async_batching.engine.builder import EngineParts
from hf_async_batching.errors import RequestTooLongError, UnsupportedArgumentError
from hf_async_batching.stopping.criteria import stop_string_criterion

PromptIds = list[int] | torch.Tensor | np.ndarray[Any, Any]


def prompt_of(input_ids: PromptIds | None, inputs_embeds: torch.Tensor | None) -> list[int]:
    """Token ids of a prompt; placeholders where only embeddings [length, hidden] are given.

    Raises:
        ValueError: Neither is given, they do not fit together, or the ids are no whole numbers.
    """
    if inputs_embeds is not None and not (isinstance(inputs_embeds, torch.Tensor) and inputs_embeds.dim() == 2):
        raise ValueError(f"`inputs_embeds` of a prompt must be a tensor [length, hidden], got {_shape(inputs_embeds)}")
    if input_ids is None and inputs_embeds is not None:
        return [0] * len(inputs_embeds)  # nobody looks these up
    if input_ids is None:
        raise ValueError("submit() needs `input_ids` or `inputs_embeds`")
    prompt = _prompt_list(input_ids)
    if inputs_embeds is not None and len(prompt) != len(inputs_embeds):
        raise ValueError(
            f"`inputs_embeds` has {len(inputs_embeds)} positions and `input_ids` {len(prompt)} tokens; pass as many "
            "of one as of the other, or leave `input_ids` out"
        )
    return prompt


def _prompt_list(input_ids: PromptIds) -> list[int]:
    if isinstance(input_ids, (torch.Tensor, np.ndarray)):
        dtype: Any = input_ids.dtype
        whole = dtype in _INTEGERS if isinstance(dtype, torch.dtype) else np.issubdtype(dtype, np.integer)
        if input_ids.ndim != 1 or not whole:
            raise ValueError(
                "`input_ids` must be a 1-D integer tensor or array, or a list of ints, got "
                f"{_shape(input_ids)}; submit the rows of a batch one by one, without their padding"
            )
        tokens: list[int] = input_ids.tolist()
        return tokens
    if isinstance(input_ids, Iterable) and not isinstance(input_ids, (str, bytes)):
        prompt = list(input_ids)
        if all(isinstance(token, Integral) for token in prompt):
            return [int(token) for token in prompt]
    raise ValueError("`input_ids` must be a 1-D integer tensor or array, or a list of ints; tokenize text first")


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _shape(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"shape {tuple(shape)} and dtype {value.dtype}"


def criteria_of(config: GenerationConfig, own: StoppingCriteriaList | None, tokenizer: Any) -> StoppingCriteriaList:
    """The criteria of a request, in the order of `generate`, but for those that the engine decides itself."""
    own = StoppingCriteriaList(own or ())
    kinds = {type(criterion) for criterion in own}  # of one kind, the caller's takes precedence
    made = StoppingCriteriaList()
    if config.max_time is not None and MaxTimeCriteria not in kinds:
        check_real("max_time", config.max_time)
        made.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings is not None and StopStringCriteria not in kinds:
        made.append(stop_string_criterion(config.stop_strings, tokenizer))
    return StoppingCriteriaList([*made, *own])


def check_limits(request: Request, assembly: EngineParts) -> None:
    """Refuse a request that an engine cannot serve.

    Raises:
        TypeError: A token is no integer.
        ValueError: It names a token that the model does not have, or holds a number that the tables do not.
        UnsupportedArgumentError: The request reaches beyond the length up to which the model's rotary frequencies are
            those of all rows.
        RequestTooLongError: Prompt and new tokens exceed the limit of a request, or the cache.
        UnsupportedArgumentError: It has more end-of-sequence tokens than its rules can hold.
    """
    vocab, limit = assembly.forward.vocab_size, assembly.config.max_sequence_length
    _check_tokens("input_ids", request.prompt, vocab)
    if request.padding:
        # Not looked up: the tables that they are entered in hold as many.
        _check_tokens("padding", request.padding, max(vocab, assembly.forward.logit_size))
    if request.min_new_tokens and len(request.eos_token_ids) > MAX_EOS:
        raise UnsupportedArgumentError(
            f"`min_new_tokens` with more than {MAX_EOS} end-of-sequence tokens is not served here "
            f"(got {len(request.eos_token_ids)}); use `submit`, or pass fewer `eos_token_id`s"
        )
    logits = assembly.forward.logit_size
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
    if assembly.rope_limit is not None and length + request.max_new_tokens > assembly.rope_limit:
        remedy = "shorten the prompt" if length >= assembly.rope_limit else "lower `max_new_tokens`"
        raise UnsupportedArgumentError(
            f"the prompt of {length} tokens and `max_new_tokens={request.max_new_tokens}` go beyond the "
            f"{assembly.rope_limit} tokens up to which the rotary frequencies of {assembly.forward.name} are the same "
            f'for all rows of a batch; {remedy}, or pass on_unsupported="generate", or use plain `model.generate`'
        )
    if length + request.max_new_tokens > limit:
        settings = assembly.config.settings
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


# Processors of transformers that index the scores by tokens, and the fields that name these.
_INDEXING = {
    "ForcedBOSTokenLogitsProcessor": ("forced_bos_token_id", "bos_token_id"),
    "ForcedEOSTokenLogitsProcessor": ("forced_eos_token_id", "eos_token_id"),
    "ExponentialDecayLengthPenalty": ("eos_token_id", "eos_token_id"),
}


def _check_indexed(chooser: Any, vocab: int) -> None:
    """Refuse tokens beyond the scores where processors that are called look these up: a GPU may fail at that."""
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
        raise TypeError(f"`{name}` must hold integers alone: {error}") from error
    except OverflowError:
        ids = np.array([token if 0 <= token < vocab else -1 for token in tokens])
    wrong = (ids < 0) | (ids >= vocab)
    if wrong.any():
        token = tokens[int(wrong.argmax())]
        raise ValueError(f"`{name}` holds token id {token}, outside of the model's vocabulary of {vocab} tokens")


def check_group(requests: list[Request], assembly: EngineParts) -> None:
    """Refuse rows that advance together and do not fit together.

    Raises:
        ValueError: A processor of theirs names a token that the model does not have.
        UnsupportedArgumentError: They need more rows or pages than the engine has.
    """
    _check_indexed(requests[0].chooser, assembly.forward.logit_size)
    if not group_fits(requests, assembly):
        most = assembly.config.max_rows
        raise UnsupportedArgumentError(
            f"`logits_processor`: {len(requests)} rows are computed in lockstep, because a processor may look at the "
            f"whole batch, and the engine does not hold them together (at most {most} rows, and their pages); pass "
            "fewer rows per call, raise BatchingConfig(max_rows=..., num_pages=...), or set `row_wise = True` on a "
            "processor that looks at each row by itself"
        )


def group_fits(requests: list[Request], assembly: EngineParts) -> bool:
    """Whether an engine holds requests at the same time, up to their last tokens."""
    pages = assembly.engine.scheduler.pages
    needed = sum([pages.pages_for(len(request.prompt) + request.max_new_tokens) for request in requests])
    return len(requests) <= assembly.config.max_rows and needed <= pages.size
