"""What is read as parameters, and what must be called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation import LogitsProcessorList
from transformers.generation.logits_process import (
    EncoderRepetitionPenaltyLogitsProcessor,
    MinLengthLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)

from hf_async_batching.core.row_layout import ANY, MAX_EOS
from hf_async_batching.inputs.logits_processors import CallRow, SamplingSpec, read_processors


def read(processor: Any, shown: list[int], tokens: list[int]) -> SamplingSpec | None:
    row = CallRow(shown, tokens, 0, 1, (), None)
    return read_processors(LogitsProcessorList([processor]), row, do_sample=False, seed=0)


@pytest.mark.parametrize("begin", [4, 5, 2**31 + 2], ids=str)
def test_tokens_are_suppressed_at_one_position(begin: int) -> None:
    spec = read(SuppressTokensAtBeginLogitsProcessor([7], begin), [0, 0, 5, 6], [5, 6])
    assert spec is not None
    assert [(rule.token, rule.position) for rule in spec.logits.rules] == [(7, min(begin - 2, 2**31 - 1))]


@pytest.mark.parametrize("begin", [0, 1])
def test_a_position_that_never_comes_is_not_taken_for_any(begin: int) -> None:
    """Before the prompt: counted from its first token, one of these is the mark for every position."""
    spec = read(SuppressTokensAtBeginLogitsProcessor([7], begin), [0, 0, 5, 6], [5, 6])
    assert spec is None or all(rule.position != ANY for rule in spec.logits.rules)


@pytest.mark.parametrize(
    ("theirs", "ours", "known"),
    [
        ((3, 4), (4, 3), True),
        ((3, 4), (3,), False),
        (tuple(range(MAX_EOS)), tuple(range(MAX_EOS)), True),
        (tuple(range(MAX_EOS + 1)), tuple(range(MAX_EOS + 1)), False),
    ],
    ids=["any order", "other ends", "as many as a row holds", "more than a row holds"],
)
def test_a_minimum_length_is_read_where_the_row_holds_its_ends(
    theirs: tuple[int, ...], ours: tuple[int, ...], known: bool
) -> None:
    processor = MinLengthLogitsProcessor(9, torch.tensor(theirs))
    row = CallRow([5, 6], [5, 6], 0, 1, ours, None)
    spec = read_processors(LogitsProcessorList([processor]), row, do_sample=False, seed=0)
    assert (spec is not None) == known


@pytest.mark.parametrize(("batch", "rows", "known"), [(2, 4, True), (2, 3, False), (0, 2, False)])
def test_prompts_of_a_processor_are_those_of_the_rows(batch: int, rows: int, known: bool) -> None:
    """A processor that holds prompts is read where each row finds its own among them."""
    processor = EncoderRepetitionPenaltyLogitsProcessor(2.0, torch.tensor([[5, 6]]).expand(batch, 2))
    row = CallRow([5, 6], [5, 6], 0, rows, (), None)
    spec = read_processors(LogitsProcessorList([processor]), row, do_sample=False, seed=0)
    assert (spec is not None) == known
