"""What is read as parameters, and what must be called."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.generation import LogitsProcessorList
from transformers.generation.logits_process import SuppressTokensAtBeginLogitsProcessor

from hf_async_batching.core.row_layout import ANY
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
