"""Logits to tokens for a whole batch, each row by its own parameters, without reading anything back.

Draws use the Gumbel-max trick in its exponential form (the arg-min of E_i / p_i, E_i ~ Exp(1), is a draw from p) with
random bits hashed from (seed, position, token): stateless, so that a request's tokens do not depend on its company,
on the order of steps, or on a preemption. The hash is Chris Wellons' `lowbias32`
(https://nullprogram.com/blog/2018/07/31/).

The filters are thresholds on the scaled logits, computed from the largest `candidates` of them: in transformers'
order temperature, top-k, top-p, min-p, each over what the one before has left.
"""

from __future__ import annotations

import torch

from hf_async_batching import staging
from hf_async_batching.argmax import argmax
from hf_async_batching.plan import Features

_NEGATIVE_INFINITY = float("-inf")


class Sampler:
    """Draws the next tokens of a step."""

    def __call__(
        self,
        logits: torch.Tensor,
        params: torch.Tensor | None,
        positions: torch.Tensor | None,
        features: Features,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sample one token per row.

        Args:
            logits: [rows, vocab], any float dtype; not changed.
            params: int32 [rows, PARAMS], records as `staging` lays them out; None where the features leave only the
                arg-max.
            positions: int64 [rows], the position that the sampled token will take; None likewise.
            features: What any row needs.

        Returns:
            Tokens int32 [rows]; log-probabilities float32 [rows] of the tokens under the unfiltered logits where
            `features.logprobs`, else None.
        """
        raw = logits
        if features.min_length:
            assert params is not None and positions is not None
            logits = _without_early_eos(logits.float(), params, positions)
        tokens = argmax(logits)
        if features.sampling:
            assert params is not None and positions is not None
            drawn = _draw(logits.float(), params, positions, features.candidates)
            tokens = torch.where(params[:, staging.DO_SAMPLE] > 0, drawn.int(), tokens)
        logprobs = None
        if features.logprobs:
            scores = raw.float()
            logprobs = scores.gather(1, tokens[:, None].long())[:, 0] - scores.logsumexp(-1)
        return tokens, logprobs


def _without_early_eos(logits: torch.Tensor, params: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    eos = params[:, staging.FIRST_EOS :].long()
    early = (positions < params[:, staging.MIN_LENGTH])[:, None] & (eos >= 0) & (eos < logits.shape[1])
    # Entries that must stay untouched add 0 at token 0: a scatter that assigned would race with a real entry there.
    penalty = torch.zeros_like(eos, dtype=logits.dtype).masked_fill_(early, _NEGATIVE_INFINITY)
    return logits.scatter_add(1, eos.clamp(0, logits.shape[1] - 1), penalty)


def _draw(logits: torch.Tensor, params: torch.Tensor, positions: torch.Tensor, candidates: int) -> torch.Tensor:
    # Differences from the largest: dividing these by a tiny temperature loses no maximum to infinity.
    scaled = (logits - logits.amax(-1, keepdim=True)) / params[:, staging.TEMPERATURE].contiguous().view(
        torch.float32
    )[:, None]
    if candidates:
        threshold = _threshold(scaled, params, candidates)
        scaled = scaled.masked_fill(scaled < threshold[:, None], _NEGATIVE_INFINITY)
    exponential = _exponential(params, positions, logits.shape[1])
    return (scaled - exponential.log_()).argmax(-1)


def _threshold(scaled: torch.Tensor, params: torch.Tensor, candidates: int) -> torch.Tensor:
    """The smallest scaled logit of each row that survives all filters, float32 [rows]."""
    vocab = scaled.shape[1]
    if candidates < 0 or candidates >= vocab:
        top = scaled.sort(-1, descending=True).values
    else:
        top = scaled.topk(candidates, -1).values
    top_k = params[:, staging.TOP_K].long()
    top_k = torch.where(top_k > 0, top_k, vocab).clamp(max=top.shape[1])
    kth = top.gather(1, top_k[:, None] - 1).masked_fill(params[:, staging.TOP_K, None] <= 0, _NEGATIVE_INFINITY)
    surviving = top.masked_fill(top < kth, _NEGATIVE_INFINITY)
    # transformers sums from the smallest up and drops while the sum is at most 1 - top_p; one token always stays.
    tail = surviving.softmax(-1).flip(-1).cumsum(-1).flip(-1)
    top_p = params[:, staging.TOP_P].contiguous().view(torch.float32)[:, None]
    dropped = tail <= 1 - top_p
    dropped[:, 0] = False
    kept = surviving.masked_fill(dropped, float("inf")).amin(-1, keepdim=True)
    kept = torch.where(top_p < 1, kept, kth)
    min_p = params[:, staging.MIN_P].contiguous().view(torch.float32)[:, None]
    relative = top[:, :1] + min_p.log()
    return torch.maximum(torch.maximum(kth, kept), relative)[:, 0]


def _exponential(params: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Exp(1) variates, float32 [rows, vocab], a function of each row's seed and position alone."""
    key = _hash(params[:, staging.SEED_LOW] ^ 0x3C6EF372)
    key = _hash(key ^ params[:, staging.SEED_HIGH])
    key = _hash(key ^ positions.int())
    second_key = _hash(key + 0x1E3779B9)
    token = torch.arange(vocab, dtype=torch.int32, device=params.device)
    bits = _hash(_hash(token[None] ^ key[:, None]) + second_key[:, None])
    # 31 bits to (0, 1): small values, which decide the draw, keep their full precision. Rounding must not reach 1:
    # a token with an infinite variate could not be drawn even where it is the only one left.
    uniform = ((bits & 0x7FFFFFFF).float() + 0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_()


def _hash(x: torch.Tensor) -> torch.Tensor:
    # int32 products wrap around; the shifts are made logical by masking the copies of the sign.
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)
