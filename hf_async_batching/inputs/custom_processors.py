"""Logits processors that are called as Python code: one list for all rows of a call, or one list per row.

transformers prepares one list for the whole call. Some of its processors hold one line per prompt or one state per
row, so a row that is decoded separately needs its own copies of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation import logits_process
from transformers.generation.logits_process import LogitsProcessorList

from hf_async_batching.core.row_layout import MAX_NGRAM
from hf_async_batching.host_decoding.long_ngrams import LongNGrams
from hf_async_batching.inputs.logits_processors import CallRow

_GUIDANCE = "UnbatchedClassifierFreeGuidanceLogitsProcessor"


def is_row_wise(processors: LogitsProcessorList) -> bool:
    """Whether the caller has declared its processors row-wise: `row_wise = True` on each of them.

    transformers' own processors need no such mark, but at least one of the caller's must carry it.
    """
    own = [processor for processor in processors if not _is_known(processor)]
    return bool(own) and all([getattr(processor, "row_wise", False) is True for processor in own])


def can_be_row_wise(processors: LogitsProcessorList) -> bool:
    """Whether every processor treats a row of a batch like a batch of one."""
    return all([_is_known(processor) or getattr(processor, "row_wise", False) is True for processor in processors])


def _is_known(processor: Any) -> bool:
    return type(processor).__module__ == logits_process.__name__


def processors_of_batch(processors: LogitsProcessorList, plain_model: Callable[[], Any]) -> LogitsProcessorList:
    """The processors of a call for all of its rows: the caller's objects, except for guidance's second forward."""
    return LogitsProcessorList(
        [
            _with_model(processor, plain_model())
            if _is_known(processor) and type(processor).__name__ == _GUIDANCE
            else processor
            for processor in processors
        ]
    )


def processors_of_row(
    processors: LogitsProcessorList, row: CallRow, plain_model: Callable[[], Any]
) -> LogitsProcessorList:
    """The processors of a call for one of its rows.

    Args:
        processors: The processors that transformers has prepared, on the caller's device.
        row: The row.
        plain_model: Makes a view of the model for a second forward, if guidance needs one.
    """
    return LogitsProcessorList([_for_row(processor, row, plain_model) for processor in processors])


def _for_row(processor: Any, row: CallRow, plain_model: Callable[[], Any]) -> Any:
    """A processor of a call, for one of its rows."""
    name = type(processor).__name__ if type(processor).__module__ == logits_process.__name__ else ""
    if name == "RepetitionPenaltyLogitsProcessor" and isinstance(processor.prompt_ignore_length, torch.Tensor):
        own = copy.copy(processor)
        own.prompt_ignore_length = processor.prompt_ignore_length[row.index : row.index + 1]
        return own
    if name == "EncoderRepetitionPenaltyLogitsProcessor":
        own, line = copy.copy(processor), row.of(processor.encoder_input_ids.shape[0])
        own.encoder_input_ids = processor.encoder_input_ids[line : line + 1]
        return own
    if name == "EncoderNoRepeatNGramLogitsProcessor":
        own, line = copy.copy(processor), row.of(processor.batch_size)
        own.batch_size, own.generated_ngrams = 1, processor.generated_ngrams[line : line + 1]
        return own
    if name == "NoRepeatNGramLogitsProcessor" and processor.ngram_size > MAX_NGRAM:
        return LongNGrams(processor.ngram_size)
    if name == "PrefixConstrainedLogitsProcessor":
        allowed = processor._prefix_allowed_tokens_fn
        prompt = row.index // processor._num_beams  # index of the prompt, which several sequences may share
        return type(processor)(lambda _, sent: allowed(prompt, sent), 1)
    if name == _GUIDANCE:
        return _guidance_for_row(processor, row, plain_model)
    if name == "SynthIDTextWatermarkLogitsProcessor":
        return copy.deepcopy(processor)  # it keeps state per row
    return processor


def _guidance_for_row(processor: Any, row: CallRow, plain_model: Callable[[], Any]) -> Any:
    """Guidance with its own unconditional forward and cache for the row."""
    own = _with_model(processor, plain_model())
    for name in ("input_ids", "attention_mask"):
        given = own.unconditional_context[name]
        if given is not None:
            line = row.of(given.shape[0])
            own.unconditional_context[name] = given[line : line + 1].to(own.model.device)
    return own


def _with_model(processor: Any, model: Any) -> Any:
    # The user's own model would write defaults to its config, which other threads read.
    own = copy.copy(processor)
    own.model = model
    own.unconditional_context = dict(processor.unconditional_context)
    return own
