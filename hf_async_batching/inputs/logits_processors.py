"""Read the logits processors that transformers has prepared for a call, as parameters for each of its rows.

The list is authoritative: it holds what `generate` would apply, in order, including the caller's own processors. The
engine serves a row by parameters, together with all other rows, if it knows every processor of the list, each occurs
at most once, and all are in transformers' order. Any other list is called as a whole (`token_chooser`), so the order
and the details of all processors are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers.generation import logits_process
from transformers.generation.logits_process import LogitsProcessorList

from hf_async_batching.core.field_checks import check_real
from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.request import SamplingParams
from hf_async_batching.core.row_layout import (
    MAX_EOS,
    MAX_INT32,
    MAX_NGRAM,
    MAX_PADDING,
    MAX_PREFIX,
    MAX_RULES,
    Rule,
    RuleKind,
)
from hf_async_batching.host_decoding.token_chooser import TokenChooser


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How the tokens of one request are chosen: its logits processors as parameters.

    Attributes:
        sampling: Filters, and the seed of the draws.
        logits: Penalties, biases and other changes of the logits.
        min_new_tokens: Number of new tokens before which no end-of-sequence token is chosen.
        padding: Padding tokens that processors see in front of the prompt.
        chooser: Calls the processors outside the engine; None if the fields above describe them all.
    """

    sampling: SamplingParams = field(default_factory=SamplingParams)
    logits: LogitsParams = field(default_factory=LogitsParams)
    min_new_tokens: int = 0
    padding: tuple[int, ...] = ()
    chooser: TokenChooser | None = None


@dataclass(frozen=True, slots=True)
class CallRow:
    """One row of a `generate` call.

    Attributes:
        shown: Token ids as the caller passed them, padding included.
        tokens: The same without padding.
        index: Index of the row.
        rows: Number of rows in the call.
        eos: End-of-sequence tokens.
        eos_tensor: The tensor of these that transformers made; most processors share it.
    """

    shown: list[int]
    tokens: list[int]
    index: int
    rows: int
    eos: tuple[int, ...]
    eos_tensor: torch.Tensor | None

    @property
    def padding(self) -> int:
        """Number of padding tokens, in any place."""
        return len(self.shown) - len(self.tokens)

    @property
    def left_padded(self) -> bool:
        """Whether all padding stands on the left."""
        return self.shown[self.padding :] == self.tokens

    def of(self, batch: int) -> int:
        """The row's line in a tensor with `batch` lines: one per prompt, and several rows may share a prompt."""
        return self.index * batch // self.rows


@dataclass(slots=True)
class _Draft:
    """The parameters that have been read so far; `reads_padding` if a processor reads all tokens of the padding."""

    do_sample: bool
    sampling: dict[str, Any] = field(default_factory=dict)
    logits: dict[str, Any] = field(default_factory=dict)
    rules: list[Rule] = field(default_factory=list)
    min_new_tokens: int = 0
    reads_padding: bool = False


def read_processors(
    processors: LogitsProcessorList, row: CallRow, *, do_sample: bool, seed: int, logprobs: bool = False
) -> SamplingSpec | None:
    """Read the processors of a call for one of its rows.

    Args:
        processors: The processors that transformers has prepared.
        row: The row.
        do_sample: Whether to draw tokens.
        seed: The row's seed.
        logprobs: Whether to return log-probabilities.

    Returns:
        The parameters, without a chooser; None if the list must be called.

    Raises:
        ValueError: A parameter is out of range.
    """
    draft, last = _Draft(do_sample), -1
    for processor in processors:
        kind = type(processor)
        place = _ORDER.get(kind)
        if place is None or place <= last or not _READERS[kind](processor, row, draft):
            return None
        last = place
    if len(draft.rules) > MAX_RULES or any(len(rule.prefix) > MAX_PREFIX for rule in draft.rules):
        return None
    logits = LogitsParams(tuple(draft.rules), **draft.logits)
    padding: tuple[int, ...] = ()
    if row.padding and (draft.reads_padding or any(rule.prefix for rule in draft.rules)):
        if not row.left_padded:
            return None
        whole = row.shown[: row.padding]
        # The last tokens stand for all only if all are the same; a rule looks at no others.
        if draft.reads_padding and len(whole) > MAX_PADDING and len(set(whole)) > 1:
            return None
        padding = tuple(whole[-MAX_PADDING:])
    if not row.eos:
        draft.min_new_tokens = 0
    sampling = SamplingParams(logprobs=logprobs)
    if do_sample:
        sampling = SamplingParams(do_sample=True, seed=seed, logprobs=logprobs, **draft.sampling)
    return SamplingSpec(sampling, logits, draft.min_new_tokens, padding)


# -- readers: each reads what a processor does, or reports that it cannot -------------------------------------------


def _sequence_bias(kind: RuleKind, processor: Any, row: CallRow, draft: _Draft) -> bool:  # noqa: ARG001
    if len(draft.rules) + len(processor.sequence_bias) > MAX_RULES:
        return False  # before a long list of rules is made
    for sequence, bias in processor.sequence_bias.items():
        if math.isnan(bias):
            return False
        if not sequence:
            continue  # `generate` skips it too
        *prefix, token = (int(one) for one in sequence)
        draft.rules.append(Rule(kind, token, tuple(prefix), float(bias)))
    return True


def _encoder_repetition(processor: Any, row: CallRow, draft: _Draft) -> bool:
    ids = processor.encoder_input_ids
    if not _divides(ids.shape[0], row) or ids[row.of(ids.shape[0])].tolist() != row.shown:
        return False
    draft.logits["encoder_repetition_penalty"] = float(processor.penalty)
    draft.reads_padding |= processor.penalty != 1.0
    return True


def _repetition(processor: Any, row: CallRow, draft: _Draft) -> bool:
    ignored = processor.prompt_ignore_length
    if isinstance(ignored, torch.Tensor):
        if ignored.shape != (row.rows,):
            return False
        ignored = int(ignored[row.index])
    if (ignored or 0) != row.padding or not row.left_padded:
        return False
    draft.logits["repetition_penalty"] = float(processor.penalty)
    return True


def _ngram(processor: Any, row: CallRow, draft: _Draft) -> bool:  # noqa: ARG001
    draft.logits["no_repeat_ngram_size"] = int(processor.ngram_size)
    draft.reads_padding = True
    return bool(processor.ngram_size <= MAX_NGRAM)


def _encoder_ngram(processor: Any, row: CallRow, draft: _Draft) -> bool:
    size, batch = processor.ngram_size, processor.batch_size
    if not _divides(batch, row) or size > MAX_NGRAM:
        return False
    following: dict[tuple[int, ...], list[int]] = {}
    for ngram in zip(*[row.shown[i:] for i in range(size)]):
        following.setdefault(tuple(ngram[:-1]), []).append(ngram[-1])
    if processor.generated_ngrams[row.of(batch)] != following:
        return False
    draft.logits["encoder_no_repeat_ngram_size"] = int(size)
    draft.reads_padding = True
    return True


def _min_length(processor: Any, row: CallRow, draft: _Draft) -> bool:
    return _minimum(processor.min_length, processor, row, draft)


def _min_new_tokens(processor: Any, row: CallRow, draft: _Draft) -> bool:
    return _minimum(processor.prompt_length_to_skip + processor.min_new_tokens, processor, row, draft)


def _minimum(length: float, processor: Any, row: CallRow, draft: _Draft) -> bool:
    # Its place among the others does not matter, as long as one record holds all tokens.
    draft.min_new_tokens = max(draft.min_new_tokens, math.ceil(length) - len(row.shown))
    return _same_ends(processor, row)


def _forced_bos(processor: Any, row: CallRow, draft: _Draft) -> bool:
    if len(row.shown) == 1:
        draft.rules.append(Rule(RuleKind.FORCE, int(processor.bos_token_id), position=1))
    return True


def _forced_eos(processor: Any, row: CallRow, draft: _Draft) -> bool:
    position = min(math.ceil(processor.max_length) - 1 - row.padding, MAX_INT32)
    draft.rules = [rule for rule in draft.rules if rule.kind is not RuleKind.FORCE or rule.position != position]
    draft.rules += [Rule(RuleKind.FORCE, token, position=position) for token in processor.eos_token_id.tolist()]
    return True


def _remove_invalid(processor: Any, row: CallRow, draft: _Draft) -> bool:  # noqa: ARG001
    draft.logits["remove_invalid"] = True
    return True


def _decay(processor: Any, row: CallRow, draft: _Draft) -> bool:
    start, factor = processor.regulation_start, processor.regulation_factor
    check_real("exponential_decay_length_penalty", start)
    check_real("exponential_decay_length_penalty", factor)
    factor = float(factor)
    if not (start % 1 == 0 and math.isfinite(factor)):  # also False for NaN
        return False
    draft.logits["decay_start"] = max(-MAX_INT32, min(int(start) - row.padding, MAX_INT32))  # out of reach, both
    draft.logits["decay_factor"] = factor
    return _same_ends(processor, row)


def _suppress(processor: Any, row: CallRow, draft: _Draft) -> bool:  # noqa: ARG001
    draft.rules += [Rule(RuleKind.SUPPRESS, token) for token in _token_ids(processor.suppress_tokens)]
    return True


def _begin_suppress(processor: Any, row: CallRow, draft: _Draft) -> bool:
    position = min(processor.begin_index - row.padding, MAX_INT32)
    tokens = _token_ids(processor.begin_suppress_tokens)
    if position >= 0:  # otherwise the row is past it from the start; a negative position would match any position
        draft.rules += [Rule(RuleKind.SUPPRESS, token, position=position) for token in tokens]
    return True


def _token_ids(tokens: torch.Tensor) -> list[int]:
    """The token ids that can be in a vocabulary; suppressing any other id changes nothing."""
    return [int(token) for token in tokens.flatten().tolist() if 0 <= token <= MAX_INT32 and token % 1 == 0]


def _filter(name: str, attribute: str, processor: Any, row: CallRow, draft: _Draft) -> bool:  # noqa: ARG001
    value = getattr(processor, attribute)
    draft.sampling[name] = min(value, MAX_INT32) if name == "top_k" else float(value)
    return (
        draft.do_sample
        and getattr(processor, "min_tokens_to_keep", 1) == 1
        and getattr(processor, "filter_value", -math.inf) == -math.inf
        and getattr(processor, "top_n", 100) == 100
    )


def _renormalize(processor: Any, row: CallRow, draft: _Draft) -> bool:  # noqa: ARG001
    draft.logits["renormalize"] = True
    return True


def _divides(batch: int, row: CallRow) -> bool:
    return batch > 0 and row.rows % batch == 0


def _same_ends(processor: Any, row: CallRow) -> bool:
    tokens: torch.Tensor = processor.eos_token_id
    if len(row.eos) > MAX_EOS:
        return False
    return tokens is row.eos_tensor or set(tokens.tolist()) == set(row.eos)


# In transformers' order of application; names that a release lacks are left out.
_BY_NAME: Mapping[str, Callable[[Any, CallRow, _Draft], bool]] = {
    "SequenceBiasLogitsProcessor": partial(_sequence_bias, RuleKind.BIAS),
    "EncoderRepetitionPenaltyLogitsProcessor": _encoder_repetition,
    "RepetitionPenaltyLogitsProcessor": _repetition,
    "NoRepeatNGramLogitsProcessor": _ngram,
    "EncoderNoRepeatNGramLogitsProcessor": _encoder_ngram,
    "NoBadWordsLogitsProcessor": partial(_sequence_bias, RuleKind.BAN),
    "MinLengthLogitsProcessor": _min_length,
    "MinNewTokensLengthLogitsProcessor": _min_new_tokens,
    "ForcedBOSTokenLogitsProcessor": _forced_bos,
    "ForcedEOSTokenLogitsProcessor": _forced_eos,
    "InfNanRemoveLogitsProcessor": _remove_invalid,
    "ExponentialDecayLengthPenalty": _decay,
    "SuppressTokensLogitsProcessor": _suppress,
    "SuppressTokensAtBeginLogitsProcessor": _begin_suppress,
    "TemperatureLogitsWarper": partial(_filter, "temperature", "temperature"),
    "TopHLogitsWarper": partial(_filter, "top_h", "top_h"),
    "TopKLogitsWarper": partial(_filter, "top_k", "top_k"),
    "TopPLogitsWarper": partial(_filter, "top_p", "top_p"),
    "MinPLogitsWarper": partial(_filter, "min_p", "min_p"),
    "TypicalLogitsWarper": partial(_filter, "typical_p", "mass"),
    "EpsilonLogitsWarper": partial(_filter, "epsilon_cutoff", "epsilon"),
    "EtaLogitsWarper": partial(_filter, "eta_cutoff", "epsilon"),
    "LogitNormalization": _renormalize,
}
_READERS = {getattr(logits_process, name): read for name, read in _BY_NAME.items() if hasattr(logits_process, name)}
_ORDER = {kind: place for place, kind in enumerate(_READERS)}
