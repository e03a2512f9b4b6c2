"""The filters of transformers' warpers, in their order; each sees the tokens that earlier filters have kept.

Top-k, top-p and min-p are thresholds on the scaled logits, computed from the largest `candidates` of them. Unlike
transformers' top-p, ours keeps all tokens that are as probable as the last kept token.
"""

from __future__ import annotations

import torch

from hf_async_batching.core import row_layout
from hf_async_batching.core.logits_params import Stage
from hf_async_batching.core.plan import Features
from hf_async_batching.sampling.metadata import SamplingMetadata

_NEGATIVE_INFINITY = float("-inf")

# Number of most probable tokens that transformers' top-h considers.
_TOP_H_TOKENS = 100


def filtered(logits: torch.Tensor, rows: SamplingMetadata, features: Features) -> torch.Tensor:
    """Scores to draw from.

    Args:
        logits: float32 [rows, vocab], not changed.
        rows: Parameters of the rows.
        features: Needs of the rows together. Scores that no request returns are shifted so that the largest logit is
            0: dividing by a tiny temperature then turns no maximum into infinity.

    Returns:
        float32 [rows, vocab]; -inf for tokens that are filtered out.
    """
    temperature = rows.floats(row_layout.TEMPERATURE)
    shifted = (logits - logits.amax(-1, keepdim=True)) / temperature
    scores = shifted
    if features.scores:
        scores = logits / temperature
        # `generate` fails if the largest score overflows to infinity. A row must not depend on which rows want scores.
        scores = torch.where(scores.amax(-1, keepdim=True).isfinite(), scores, shifted)
    stages = features.stages
    if stages & Stage.TOP_H:
        scores = _top_h(scores, rows)
    if features.candidates:
        below = scores < _threshold(scores, rows, features.candidates)
        scores = scores.masked_fill(below, _NEGATIVE_INFINITY)
    if stages & Stage.TYPICAL:
        scores = _typical(scores, rows)
    if stages & Stage.EPSILON:
        scores = _at_least(scores, rows.floats(row_layout.EPSILON))
    if stages & Stage.ETA:
        epsilon = rows.floats(row_layout.ETA)
        scores = _at_least(scores, torch.minimum(epsilon, epsilon.sqrt() * torch.exp(-_entropy(scores))))
    return scores


def _threshold(scores: torch.Tensor, rows: SamplingMetadata, candidates: int) -> torch.Tensor:
    """The smallest score of each row that passes top-k, top-p and min-p, float32 [rows, 1]."""
    vocab = scores.shape[1]
    if candidates < 0 or candidates >= vocab:
        top = scores.sort(-1, descending=True).values
    else:
        top = scores.topk(candidates, -1).values
    asked = rows.integers(row_layout.TOP_K).long()
    top_k = torch.where(asked > 0, asked, vocab).clamp(max=top.shape[1])
    kth = top.gather(1, top_k - 1).masked_fill(asked <= 0, _NEGATIVE_INFINITY)
    surviving = top.masked_fill(top < kth, _NEGATIVE_INFINITY)
    # transformers sums up from the smallest, and drops tokens while the sum is at most 1 - top_p; one token stays.
    tail = surviving.softmax(-1).flip(-1).cumsum(-1).flip(-1)
    top_p = rows.floats(row_layout.TOP_P)
    dropped = tail <= 1 - top_p
    dropped[:, 0] = False
    kept = surviving.masked_fill(dropped, float("inf")).amin(-1, keepdim=True)
    kept = torch.where(top_p < 1, kept, kth)
    relative = top[:, :1] + rows.floats(row_layout.MIN_P).log()
    return torch.maximum(torch.maximum(kth, kept), relative)


def _top_h(scores: torch.Tensor, rows: SamplingMetadata) -> torch.Tensor:
    top, tokens = scores.topk(min(_TOP_H_TOKENS, scores.shape[1]), -1)
    probabilities = top.softmax(-1)
    bound = rows.floats(row_layout.TOP_H)
    within = (-probabilities * probabilities.log()).cumsum(-1) <= _entropy(top) * bound
    within[:, 0] = True
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, tokens, within)
    return scores.masked_fill(~kept & (bound > 0), _NEGATIVE_INFINITY)


def _typical(scores: torch.Tensor, rows: SamplingMetadata) -> torch.Tensor:
    mass = rows.floats(row_layout.TYPICAL_P)
    logs = scores.log_softmax(-1)
    surprise = (-logs - -(logs * logs.exp()).nansum(-1, keepdim=True)).abs()
    ordered, tokens = surprise.sort(-1)
    cumulative = scores.gather(1, tokens).softmax(-1).cumsum(-1)
    last = (cumulative < mass).sum(1, keepdim=True).clamp(max=scores.shape[1] - 1)
    removed = (surprise > ordered.gather(1, last)) & (mass < 1)
    return scores.masked_fill(removed, _NEGATIVE_INFINITY)


def _at_least(scores: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    removed = (scores.softmax(-1) < least) & (scores < scores.amax(-1, keepdim=True))
    return scores.masked_fill(removed, _NEGATIVE_INFINITY)


def _entropy(scores: torch.Tensor) -> torch.Tensor:
    logs = scores - scores.logsumexp(-1, keepdim=True)
    finite = logs.clamp(min=torch.finfo(logs.dtype).min)
    return -(finite * logs.softmax(-1)).sum(-1, keepdim=True)
