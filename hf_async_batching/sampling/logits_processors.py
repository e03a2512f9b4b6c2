"""Change logits before they are filtered, in the order of transformers' own processors.

Every change runs for all rows at once, each with its own parameters; a row without a change keeps its logits bit by
bit.
"""

from __future__ import annotations

import torch

from hf_async_batching.core import row_layout
from hf_async_batching.core.logits_params import Stage
from hf_async_batching.core.plan import Features
from hf_async_batching.core.row_layout import ANY, BIAS, KIND, MAX_PREFIX, POSITION, TOKEN, RuleKind
from hf_async_batching.sampling.metadata import SamplingMetadata
from hf_async_batching.sampling.token_history import IN_PROMPT, OCCURRED

_NEGATIVE_INFINITY = float("-inf")


def changed(logits: torch.Tensor, rows: SamplingMetadata, features: Features) -> torch.Tensor:
    """Apply all changes that any row asks for.

    Args:
        logits: float32 [rows, vocab], not changed.
        rows: Parameters of the rows.
        features: Needs of the rows together.

    Returns:
        float32 [rows, vocab].
    """
    stages = features.stages
    ruled = stages & (Stage.SEQUENCE_BIAS | Stage.BAD_WORDS | Stage.FORCED | Stage.SUPPRESS)
    rules = _Rules(rows, logits.shape[1]) if ruled else None
    if rules is not None and stages & Stage.SEQUENCE_BIAS:
        logits = logits + rules.biases(RuleKind.BIAS)
    if stages & Stage.ENCODER_REPETITION:
        logits = penalized(logits, rows, row_layout.ENCODER_PENALTY, IN_PROMPT)
    if features.penalty:
        logits = penalized(logits, rows, row_layout.REPETITION_PENALTY, OCCURRED)
    if stages & Stage.NGRAM:
        logits = _without_ngrams(logits, rows, row_layout.NGRAM, rows.lengths)
    if stages & Stage.ENCODER_NGRAM:
        prompt = (rows.integers(row_layout.PROMPT_LENGTH) + rows.integers(row_layout.PADDING)).long()
        logits = _without_ngrams(logits, rows, row_layout.ENCODER_NGRAM, prompt)
    if rules is not None and stages & Stage.BAD_WORDS:
        logits = logits + rules.biases(RuleKind.BAN)
    if features.min_length:
        logits = without_early_eos(logits, rows.params, rows.positions)
    if rules is not None and stages & Stage.FORCED:
        logits = rules.forced(logits)
    if stages & Stage.REMOVE_INVALID:
        logits = _valid(logits, rows)
    if stages & Stage.DECAY:
        logits = _decayed(logits, rows)
    if rules is not None and stages & Stage.SUPPRESS:
        logits = logits.masked_fill(rules.mask(RuleKind.SUPPRESS), _NEGATIVE_INFINITY)
    return logits


def penalized(logits: torch.Tensor, rows: SamplingMetadata, column: int, bit: int) -> torch.Tensor:
    """Divide positive logits of tokens whose `bit` is set by the penalty in `column`, and multiply negative ones."""
    penalty = rows.floats(column)
    seen = (rows.seen(logits.shape[1]) & bit) > 0
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def without_early_eos(logits: torch.Tensor, params: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Forbid end-of-sequence tokens in rows that have not reached their minimum length."""
    eos = params[:, row_layout.FIRST_EOS :].long()
    early = (positions < params[:, row_layout.MIN_LENGTH])[:, None] & (eos >= 0) & (eos < logits.shape[1])
    # Entries without effect add 0 at token 0. A scatter that assigns would race with a real entry there.
    penalty = torch.zeros_like(eos, dtype=logits.dtype).masked_fill_(early, _NEGATIVE_INFINITY)
    return logits.scatter_add(1, eos.clamp(0, logits.shape[1] - 1), penalty)


class _Rules:
    """The rules of all rows, and where each applies in this step."""

    def __init__(self, rows: SamplingMetadata, vocab: int) -> None:
        assert rows.memory is not None and rows.rows is not None
        words = rows.memory.rules_of(rows.rows, rows.bounds.rules)
        self._kinds = words[..., KIND]
        self._tokens = words[..., TOKEN].long()
        self._biases = words[..., BIAS].contiguous().view(torch.float32)
        position = words[..., POSITION]
        applies = (position == ANY) | (position == rows.positions[:, None])
        history = rows.memory.histories_of(rows.rows, rows.bounds.history)
        for back in range(MAX_PREFIX):
            wanted = words[..., BIAS + 1 + back]
            index = rows.lengths - 1 - back
            before = history.gather(1, index.clamp(0, history.shape[1] - 1))
            applies = applies & ((wanted == ANY) | ((wanted == before) & (index >= 0)))
        self._applies = applies & (self._tokens >= 0) & (self._tokens < vocab)
        self._vocab = vocab

    def biases(self, kind: RuleKind) -> torch.Tensor:
        """float32 [rows, vocab], the sums of the biases that apply now."""
        active = self._applies & (self._kinds == kind)
        added = torch.where(active, self._biases, 0.0)
        return added.new_zeros(added.shape[0], self._vocab).scatter_add(1, self._tokens * active, added)

    def mask(self, kind: RuleKind) -> torch.Tensor:
        """bool [rows, vocab], the tokens of rules that apply now."""
        # A spare column takes entries without effect.
        target = torch.where(self._applies & (self._kinds == kind), self._tokens, self._vocab)
        out = torch.zeros(target.shape[0], self._vocab + 1, dtype=torch.bool, device=target.device)
        return out.scatter_(1, target, torch.ones_like(target, dtype=torch.bool))[:, : self._vocab]

    def forced(self, logits: torch.Tensor) -> torch.Tensor:
        """0 for forced tokens and -inf for all others, in rows where a token is forced now."""
        mask = self.mask(RuleKind.FORCE)
        only = torch.zeros_like(logits).masked_fill_(~mask, _NEGATIVE_INFINITY)
        return torch.where(mask.any(-1, keepdim=True), only, logits)


def _without_ngrams(logits: torch.Tensor, rows: SamplingMetadata, column: int, ends: torch.Tensor) -> torch.Tensor:
    """Ban tokens that would repeat an n-gram of the first `ends` tokens, int64 [rows, 1], of the history."""
    assert rows.memory is not None and rows.rows is not None
    history = rows.memory.histories_of(rows.rows, rows.bounds.history)
    longest, vocab = history.shape[1], logits.shape[1]
    size = rows.integers(column).long()
    lengths = rows.lengths
    start = torch.arange(longest, device=logits.device)[None]
    matches = (size > 0) & (start + size <= ends) & (lengths >= size - 1)
    for i in range(min(rows.bounds.ngram - 1, longest)):  # no history holds a longer n-gram
        # Compare the last size - 1 tokens with each window's.
        suffix = history.gather(1, (lengths - size + 1 + i).clamp(0, longest - 1))
        window = history.gather(1, (start + i).clamp(max=longest - 1).expand(history.shape[0], -1))
        matches = matches & ((window == suffix) | (i >= size - 1))
    completing = history.gather(1, (start + size - 1).clamp(0, longest - 1)).long()
    matches = matches & (completing >= 0) & (completing < vocab)
    banned = torch.zeros(logits.shape[0], vocab + 1, dtype=torch.bool, device=logits.device)
    banned.scatter_(1, torch.where(matches, completing, vocab), torch.ones_like(completing, dtype=torch.bool))
    return logits.masked_fill(banned[:, :vocab], _NEGATIVE_INFINITY)


def _valid(logits: torch.Tensor, rows: SamplingMetadata) -> torch.Tensor:
    limits = torch.finfo(logits.dtype)
    valid = torch.nan_to_num(logits, nan=0.0, posinf=limits.max, neginf=limits.min)
    return torch.where(rows.integers(row_layout.REMOVE_INVALID) > 0, valid, logits)


def _decayed(logits: torch.Tensor, rows: SamplingMetadata) -> torch.Tensor:
    beyond = rows.positions[:, None] - rows.integers(row_layout.DECAY_START)
    factor = torch.pow(rows.doubles(row_layout.DECAY), beyond.clamp(min=0).double()) - 1
    eos = rows.params[:, row_layout.FIRST_EOS :].long()
    real = (eos >= 0) & (eos < logits.shape[1])
    # Unused entries of the record add 0 to token 0; an end token that is listed twice counts once.
    first = torch.ones_like(real)
    for i in range(1, eos.shape[1]):
        first[:, i] = (eos[:, :i] != eos[:, i : i + 1]).all(-1)
    tokens = eos * real
    current = logits.gather(1, tokens)
    active = real & first & (beyond > 0) & current.isfinite()
    added = torch.where(active, current.abs() * factor.float(), 0.0)
    return logits.scatter_add(1, tokens, added)
