"""Processors that are called row by row: each row gets its own line of what transformers prepared for the call."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.generation import LogitsProcessorList
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from hf_async_batching.core.row_layout import MAX_NGRAM
from hf_async_batching.host_decoding.long_ngrams import LongNGrams
from hf_async_batching.inputs.custom_processors import (
    can_be_row_wise,
    is_row_wise,
    processors_of_batch,
    processors_of_row,
)
from hf_async_batching.inputs.logits_processors import CallRow

VOCAB = 12
IDS = torch.tensor([[1, 2, 3, 1, 2], [4, 5, 6, 4, 5], [7, 8, 9, 7, 8], [1, 4, 7, 1, 4]])
THEIRS = SimpleNamespace(device=torch.device("cpu"))
OURS = SimpleNamespace(device=torch.device("cpu"))


def own(processor: Any, index: int, rows: int = 4) -> Any:
    """The processor of one row of the call."""
    shown = IDS[index].tolist()
    row = CallRow(shown, shown, index, rows, (), None)
    (made,) = processors_of_row(LogitsProcessorList([processor]), row, lambda: OURS)
    return made


@pytest.mark.parametrize(
    "make",
    [
        lambda ids: RepetitionPenaltyLogitsProcessor(3.0, torch.tensor([0, 1, 3, 4])),
        lambda ids: RepetitionPenaltyLogitsProcessor(3.0, 2),
        lambda ids: EncoderRepetitionPenaltyLogitsProcessor(3.0, ids),
        lambda ids: EncoderNoRepeatNGramLogitsProcessor(3, ids),
        lambda ids: NoRepeatNGramLogitsProcessor(3),
        lambda ids: PrefixConstrainedLogitsProcessor(lambda prompt, sent: [prompt, int(sent[-1])], 1),
        lambda ids: PrefixConstrainedLogitsProcessor(lambda prompt, sent: [prompt, int(sent[-1])], 2),
    ],
    ids=["ignored per row", "ignored", "encoder penalty", "encoder n-grams", "n-grams", "prefix", "shared prefix"],
)
def test_a_row_alone_gets_the_scores_that_it_has_in_the_batch(make: Any) -> None:
    processor = make(IDS)
    scores = torch.linspace(-2, 3, 4 * VOCAB).view(4, VOCAB)
    whole = processor(IDS, scores.clone())
    assert not torch.equal(whole, scores)
    before = copy.copy(vars(processor))
    for index in range(4):
        line = own(processor, index)(IDS[index : index + 1], scores[index : index + 1].clone())
        assert torch.equal(line, whole[index : index + 1]), index
    assert all(value is before[name] for name, value in vars(processor).items()), "the caller's stays as it is"


def test_rows_of_one_prompt_share_its_line() -> None:
    """Two prompts with two sequences each."""
    penalty, ngrams = (
        EncoderRepetitionPenaltyLogitsProcessor(3.0, IDS[:2]),
        EncoderNoRepeatNGramLogitsProcessor(3, IDS[:2]),
    )
    for index, prompt in ((0, 0), (1, 0), (2, 1), (3, 1)):
        assert own(penalty, index).encoder_input_ids.tolist() == [IDS[prompt].tolist()]
        assert own(ngrams, index).generated_ngrams == [ngrams.generated_ngrams[prompt]]
        assert own(ngrams, index).batch_size == 1


def test_guidance_has_the_rows_own_negative_prompt_and_a_model_of_ours() -> None:
    negative, mask = torch.arange(8).view(4, 2), torch.tensor([[1, 1], [0, 1], [1, 1], [0, 1]])
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, THEIRS, negative, mask)
    made = [own(processor, index) for index in range(4)]
    contexts = [one.unconditional_context for one in made]
    assert [context["input_ids"].tolist() for context in contexts] == [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]
    assert [context["attention_mask"].tolist() for context in contexts] == [[[1, 1]], [[0, 1]], [[1, 1]], [[0, 1]]]
    assert all(one.model is OURS for one in made)
    assert processor.model is THEIRS and processor.unconditional_context["input_ids"] is negative
    shared = UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, THEIRS, negative[:1], None)
    context = own(shared, 3).unconditional_context
    assert context["input_ids"].tolist() == [[0, 1]] and context["attention_mask"] is None
    (batched,) = processors_of_batch(LogitsProcessorList([processor]), lambda: OURS)
    assert batched.model is OURS and batched.unconditional_context["input_ids"] is negative
    assert batched.unconditional_context is not processor.unconditional_context


@pytest.mark.parametrize(("size", "long"), [(MAX_NGRAM, False), (MAX_NGRAM + 1, True)])
def test_n_grams_that_the_engine_does_not_compare_are_kept_on_the_host(size: int, long: bool) -> None:
    processor = NoRepeatNGramLogitsProcessor(size)
    made = own(processor, 0)
    assert isinstance(made, LongNGrams) if long else made is processor


class Mine(LogitsProcessor):
    def __init__(self, row_wise: Any = None) -> None:
        if row_wise is not None:
            self.row_wise = row_wise


@pytest.mark.parametrize(
    ("marks", "with_theirs", "declared", "possible"),
    [
        ((), True, False, True),
        ((True,), False, True, True),
        ((True,), True, True, True),
        ((True, True), True, True, True),
        ((True, None), False, False, False),
        ((None,), True, False, False),
        ((1,), False, False, False),
    ],
    ids=str,
)
def test_processors_are_row_wise_by_their_mark(
    marks: tuple[Any, ...], with_theirs: bool, declared: bool, possible: bool
) -> None:
    theirs = [MinLengthLogitsProcessor(3, torch.tensor([2]))] if with_theirs else []
    processors = LogitsProcessorList([*theirs, *[Mine(mark) for mark in marks]])
    assert (is_row_wise(processors), can_be_row_wise(processors)) == (declared, possible)


def test_a_processor_of_the_caller_is_called_as_it_is() -> None:
    mine = Mine(True)
    assert own(mine, 1) is mine
    assert processors_of_batch(LogitsProcessorList([mine]), lambda: OURS)[0] is mine


def test_a_processor_that_keeps_state_per_row_is_each_rows_own() -> None:
    given: dict[str, Any] = {"ngram_len": 3, "keys": [3, 5], "sampling_table_size": 8, "sampling_table_seed": 0}
    processor = SynthIDTextWatermarkLogitsProcessor(**given, context_history_size=4, device=torch.device("cpu"))
    made = [own(processor, index) for index in range(2)]
    assert len({id(one) for one in (processor, *made)}) == 3
    assert [type(one) for one in made] == [type(processor)] * 2


def test_only_guidance_of_transformers_gets_our_model() -> None:
    class UnbatchedClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
        """The caller's own, which has the same name."""

    for kept in (UnbatchedClassifierFreeGuidanceLogitsProcessor(), NoRepeatNGramLogitsProcessor(3)):
        (same,) = processors_of_batch(LogitsProcessorList([kept]), lambda: OURS)
        assert same is kept and not hasattr(kept, "model")
