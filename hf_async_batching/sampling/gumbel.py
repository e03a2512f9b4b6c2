"""Random numbers that depend only on a row's seed, the position and the token.

They have no state, so a request's tokens do not depend on other requests, the order of steps, or a preemption. The
hash is Chris Wellons' `lowbias32` (https://nullprogram.com/blog/2018/07/31/).
"""

from __future__ import annotations

import torch

from hf_async_batching.core import row_layout


def row_keys(params: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two keys, int32 [rows] each, from each row's seed and position."""
    key = _hash(params[:, row_layout.SEED_LOW] ^ 0x3C6EF372)
    key = _hash(key ^ params[:, row_layout.SEED_HIGH])
    key = _hash(key ^ positions.int())
    return key, _hash(key + 0x1E3779B9)


def exponential(params: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Exp(1) variates, float32 [rows, vocab], that depend only on each row's seed and position."""
    key, second_key = row_keys(params, positions)
    token = torch.arange(vocab, dtype=torch.int32, device=params.device)
    bits = _hash(_hash(token[None] ^ key[:, None]) + second_key[:, None])
    # 31 bits to (0, 1): small values, which decide the draw, keep full precision. Rounding must not reach 1: a token
    # with an infinite variate could not be drawn even if it is the only one left.
    uniform = ((bits & 0x7FFFFFFF).float() + 0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_()


def _hash(x: torch.Tensor) -> torch.Tensor:
    # int32 products wrap around; masking the copies of the sign makes the shifts logical.
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)
