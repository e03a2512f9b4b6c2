"""What is read as parameters, and what must be called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.generation import LogitsProcessorList
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hf_async_batching.core.row_layout import (
    ANY,
    MAX_EOS,
    MAX_INT32,
    MAX_NGRAM,
    MAX_PADDING,
    MAX_PREFIX,
    MAX_RULES,
    RuleKind,
)
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


def read_all(*processors: Any, padding: int = 0, **changes: Any) -> SamplingSpec | None:
    tokens = [5, 6, 7]
    given = {"do_sample": False, "seed": 0, **changes}
    row = CallRow([3] * padding + tokens, tokens, 0, 1, (2,), None)
    return read_processors(LogitsProcessorList(processors), row, **given)


def test_a_processor_is_read_once_and_in_the_order_of_transformers() -> None:
    minimum, suppressed = MinLengthLogitsProcessor(9, torch.tensor([2])), SuppressTokensLogitsProcessor([7])
    assert read_all(minimum, suppressed) is not None
    for wrong in ((suppressed, minimum), (suppressed, suppressed), (minimum, minimum)):
        assert read_all(*wrong) is None


def test_a_list_without_a_place_for_all_rules_is_called() -> None:
    """Exactly as many as fit are read; nothing is left out of one that does not fit."""
    ids = range(10, 10 + MAX_RULES)
    full = SequenceBiasLogitsProcessor({(token,): 1.0 for token in ids})
    spec = read_all(full)
    assert spec is not None
    assert [rule.token for rule in spec.logits.rules] == list(ids)
    assert read_all(SequenceBiasLogitsProcessor({(token,): 1.0 for token in range(10, 11 + MAX_RULES)})) is None
    assert read_all(full, NoBadWordsLogitsProcessor([[5]])) is None
    assert read_all(full, SuppressTokensLogitsProcessor([7])) is None
    longest = (*range(10, 10 + MAX_PREFIX), 9)
    spec = read_all(SequenceBiasLogitsProcessor({longest: 2.0}))
    assert spec is not None
    assert [(rule.prefix, rule.token, rule.bias) for rule in spec.logits.rules] == [(longest[:-1], 9, 2.0)]
    assert read_all(SequenceBiasLogitsProcessor({(8, *longest): 2.0})) is None


def test_a_bias_that_is_no_number_is_called() -> None:
    processor = SequenceBiasLogitsProcessor({(5,): 1.0})
    processor.sequence_bias = {(5,): float("nan")}
    assert read_all(processor) is None
    processor.sequence_bias = {(): 3.0, (6,): 1.0}
    spec = read_all(processor)
    assert spec is not None and len(spec.logits.rules) == 1


@pytest.mark.parametrize("begin", [False, True])
def test_tokens_that_no_vocabulary_holds_are_not_suppressed(begin: bool) -> None:
    given = torch.tensor([-1, 0, 7, MAX_INT32, MAX_INT32 + 1])
    processor: Any = SuppressTokensAtBeginLogitsProcessor([7], 3) if begin else SuppressTokensLogitsProcessor([7])
    setattr(processor, "begin_suppress_tokens" if begin else "suppress_tokens", given)
    spec = read_all(processor)
    assert spec is not None
    assert [rule.token for rule in spec.logits.rules] == [0, 7, MAX_INT32]
    setattr(processor, "begin_suppress_tokens" if begin else "suppress_tokens", torch.tensor([7.5, 8.0]))
    spec = read_all(processor)
    assert spec is not None and [rule.token for rule in spec.logits.rules] == [8]


@pytest.mark.parametrize(
    ("start", "factor", "read_as"),
    [
        (4, 1.5, 2),
        (4.0, 1.5, 2),
        (4.5, 1.5, None),
        (4, float("inf"), None),
        (4, float("nan"), None),
        (2**40, 1.5, MAX_INT32),
        (-(2**40), 1.5, -MAX_INT32),
    ],
)
def test_a_decay_is_read_where_it_starts_at_a_token(start: float, factor: float, read_as: int | None) -> None:
    processor = ExponentialDecayLengthPenalty((1, 1.5), torch.tensor([2]), 0)
    processor.regulation_start, processor.regulation_factor = start, factor
    spec = read_all(processor, padding=2)
    assert (None if spec is None else (spec.logits.decay_start, spec.logits.decay_factor)) == (
        None if read_as is None else (read_as, factor)
    )


@pytest.mark.parametrize("kind", ["penalty", "n-grams", "n-grams of the prompt"])
def test_all_of_the_padding_counts_where_it_is_read(kind: str) -> None:
    """A row keeps its last tokens, which stand for the others where all are the same."""

    def given(padding: list[int]) -> SamplingSpec | None:
        tokens = [5, 6, 7]
        ids = torch.tensor([[*padding, *tokens]])
        processor: Any = {
            "penalty": lambda: EncoderRepetitionPenaltyLogitsProcessor(2.0, ids),
            "n-grams": lambda: NoRepeatNGramLogitsProcessor(2),
            "n-grams of the prompt": lambda: EncoderNoRepeatNGramLogitsProcessor(2, ids),
        }[kind]()
        return read(processor, ids[0].tolist(), tokens)

    for padding in ([], [3] * MAX_PADDING, list(range(MAX_PADDING)), [3] * (MAX_PADDING + 1)):
        spec = given(padding)
        assert spec is not None and spec.padding == tuple(padding[:MAX_PADDING])
    assert given(list(range(MAX_PADDING + 1))) is None
    assert given([3] * MAX_PADDING + [4]) is None


def test_a_penalty_that_changes_nothing_reads_no_padding() -> None:
    """A step's writes are counted for rows that need their memory, and padding would be written for others too."""
    ids = torch.tensor([[3, 3, 5, 6, 7]])
    spec = read_all(EncoderRepetitionPenaltyLogitsProcessor(1.0, ids), padding=2)
    assert spec is not None and spec.padding == () and not spec.logits.needs_seen
    spec = read_all(EncoderRepetitionPenaltyLogitsProcessor(1.0, ids), NoRepeatNGramLogitsProcessor(2), padding=2)
    assert spec is not None and spec.padding == (3, 3)


def test_a_rule_reads_the_last_of_the_padding() -> None:
    tokens, padding = [5, 6, 7], list(range(10, 11 + MAX_PADDING))
    for sequence, kept in (((8, 9), tuple(padding[1:])), ((9,), ())):
        spec = read(SequenceBiasLogitsProcessor({sequence: 1.0}), padding + tokens, tokens)
        assert spec is not None and spec.padding == kept
        between = read(SequenceBiasLogitsProcessor({sequence: 1.0}), [5, 3, 6, 7], tokens)
        assert (between is None) == bool(kept), "a prefix would reach over it"


@pytest.mark.parametrize(("size", "known"), [(MAX_NGRAM, True), (MAX_NGRAM + 1, False)])
def test_n_grams_are_read_up_to_the_longest(size: int, known: bool) -> None:
    assert (read_all(NoRepeatNGramLogitsProcessor(size)) is not None) == known
    ids = torch.tensor([[5, 6, 7]])
    assert (read_all(EncoderNoRepeatNGramLogitsProcessor(size, ids)) is not None) == known
    assert read_all(EncoderNoRepeatNGramLogitsProcessor(2, ids + 1)) is None, "of another prompt"


@pytest.mark.parametrize(
    ("ignored", "padding", "known"),
    [
        (None, 0, True),
        (0, 0, True),
        (2, 2, True),
        (None, 2, False),
        (1, 2, False),
        (torch.tensor([2]), 2, True),
        (torch.tensor([1]), 2, False),
        (torch.tensor([2, 2]), 2, False),
    ],
    ids=str,
)
def test_a_penalty_is_read_where_it_ignores_the_padding(ignored: Any, padding: int, known: bool) -> None:
    spec = read_all(RepetitionPenaltyLogitsProcessor(1.5, ignored), padding=padding)
    assert (spec is not None) == known
    assert spec is None or (spec.logits.repetition_penalty == 1.5 and spec.padding == ())


def test_a_penalty_over_padding_on_the_right_is_called() -> None:
    assert read(RepetitionPenaltyLogitsProcessor(1.5, 1), [5, 6, 3], [5, 6]) is None


def test_minimum_lengths_count_new_tokens() -> None:
    """A fraction is rounded up, the larger of two counts, and none counts where nothing can end the row."""
    ends = torch.tensor([2])
    for least, padding, expected in ((5, 0, 2), (5.5, 0, 3), (5, 1, 1), (2, 0, 0), (3, 0, 0)):
        spec = read_all(MinLengthLogitsProcessor(1, ends), padding=padding)
        assert spec is not None and spec.min_new_tokens == 0
        processor = MinLengthLogitsProcessor(1, ends)
        processor.min_length = least
        spec = read_all(processor, padding=padding)
        assert spec is not None and spec.min_new_tokens == expected
        newer = MinNewTokensLengthLogitsProcessor(3 + padding, 2, ends)
        spec = read_all(processor, newer, padding=padding)
        assert spec is not None and spec.min_new_tokens == max(expected, 2)
    endless = CallRow([5], [5], 0, 1, (), None)
    processor = MinLengthLogitsProcessor(9, torch.tensor([], dtype=torch.long))
    spec = read_processors(LogitsProcessorList([processor]), endless, do_sample=False, seed=0)
    assert spec is not None and spec.min_new_tokens == 0


def test_forced_tokens_stand_at_their_place() -> None:
    """The first new token after a prompt of one; the last token of a length that counts the padding."""
    first, last = ForcedBOSTokenLogitsProcessor(9), ForcedEOSTokenLogitsProcessor(10, [2, 4], "cpu")

    def forced(shown: list[int], tokens: list[int], *processors: Any) -> list[tuple[int, int]]:
        row = CallRow(shown, tokens, 0, 1, (2,), None)
        spec = read_processors(LogitsProcessorList(processors), row, do_sample=False, seed=0)
        assert spec is not None and all(rule.kind is RuleKind.FORCE for rule in spec.logits.rules)
        return [(rule.token, rule.position) for rule in spec.logits.rules]

    assert forced([5], [5], first, last) == [(9, 1), (2, 9), (4, 9)]
    assert forced([5, 6], [5, 6], first, last) == [(2, 9), (4, 9)]
    assert forced([3, 5], [5], first, last) == [(2, 8), (4, 8)]
    assert forced([5], [5], first, ForcedEOSTokenLogitsProcessor(2, [2], "cpu")) == [(2, 1)], "the later one counts"
    assert forced([5], [5], ForcedEOSTokenLogitsProcessor(2**40, [2], "cpu")) == [(2, MAX_INT32)]


@pytest.mark.parametrize(
    ("processor", "name", "value"),
    [
        (TemperatureLogitsWarper(0.5), "temperature", 0.5),
        (TopKLogitsWarper(5), "top_k", 5),
        (TopKLogitsWarper(2**40), "top_k", MAX_INT32),
        (TopPLogitsWarper(0.5), "top_p", 0.5),
        (MinPLogitsWarper(0.5), "min_p", 0.5),
        (TypicalLogitsWarper(0.5), "typical_p", 0.5),
        (EpsilonLogitsWarper(0.5), "epsilon_cutoff", 0.5),
        (EtaLogitsWarper(0.5, device="cpu"), "eta_cutoff", 0.5),
        (TopHLogitsWarper(0.5), "top_h", 0.5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_filters_are_read_with_their_usual_settings(processor: Any, name: str, value: float) -> None:
    spec = read_all(processor, do_sample=True, seed=4, logprobs=True)
    assert spec is not None
    assert (spec.sampling.do_sample, spec.sampling.seed, spec.sampling.logprobs) == (True, 4, True)
    assert getattr(spec.sampling, name) == pytest.approx(value)
    assert read_all(processor) is None, "without draws, they change the scores"
    for attribute, other in (("min_tokens_to_keep", 2), ("filter_value", -1e9), ("top_n", 50)):
        if hasattr(processor, attribute):
            changed = copy.copy(processor)
            setattr(changed, attribute, other)
            assert read_all(changed, do_sample=True) is None


def test_log_probabilities_are_returned_where_they_are_asked_for() -> None:
    for draws in (False, True):
        for wanted in (False, True):
            spec = read_all(do_sample=draws, logprobs=wanted)
            assert spec is not None and spec.sampling.logprobs == wanted
        spec = read_all(do_sample=draws)
        assert spec is not None and not spec.sampling.logprobs


@pytest.mark.parametrize("name", ["regulation_start", "regulation_factor"])
def test_a_length_penalty_of_no_number_is_refused_by_its_name(name: str) -> None:
    processor = ExponentialDecayLengthPenalty((2, 1.1), torch.tensor([2]), 3)
    assert read_all(processor) is not None
    setattr(processor, name, "4")
    with pytest.raises(TypeError, match="`exponential_decay_length_penalty` must be a number, got '4'"):
        read_all(processor)
