"""Multi-head latent attention over pages of latents.

Families after DeepSeek-V2 (DeepSeek-AI, 2024) expand a latent of each token to the keys and values of all heads. Pages
then hold the latent and the rotary part of the keys, which all heads share. The *absorbed* form of that paper attends
to latents themselves: the expansion's weights act on queries and results in place of keys and values. It sums in
another order than the expanded form does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

MOST_RANK = 512
"""Numbers of the longest latent that the kernels take."""

MOST_ROTARY = 128
"""Numbers of the longest rotary part that the kernels take."""


@dataclass(eq=False, slots=True)
class LatentLayer:
    """How an attention module of a view expands latents.

    Attributes:
        weight: [heads * (plain + value_dim), rank], the expansion; each head's keys come before its values.
        plain: Numbers of a head's key that come from the latent; the rotary part follows them.
        latent: [..., rank], the step's latents on their way from the expansion to attention.
    """

    weight: torch.Tensor
    plain: int
    latent: torch.Tensor | None = None

    def take(self, key: torch.Tensor) -> torch.Tensor:
        """What pages keep of the step's tokens: [tokens, rank + rotary].

        Args:
            key: [1, heads, tokens, plain + rotary], the keys that the module made; only the rotary part is read.
        """
        latent = self.latent
        assert latent is not None
        self.latent = None
        rotary = key[0, 0, :, self.plain :]
        return torch.cat([latent.reshape(-1, latent.shape[-1]).to(rotary.dtype), rotary], -1)


class Expansion(nn.Linear):
    """An expanding linear layer of a view: it hands its input over to attention and computes nothing.

    Attributes:
        layer: The attention that gets the latents.
    """

    layer: LatentLayer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Zeros [..., out_features] without memory; attention does not read them."""
        self.layer.latent = input
        return input.new_zeros(1).expand(*input.shape[:-1], self.out_features)


def keep_latents(attention: nn.Module, expansion: nn.Linear, plain: int) -> None:
    """Let an attention module of a view keep latents in pages.

    Args:
        attention: The module; `hf_interface` looks at its attribute `_paged_latents`.
        expansion: A plain linear layer in it.
        plain: See `LatentLayer`.
    """
    layer = LatentLayer(expansion.weight, plain)
    expansion.__class__ = Expansion
    cast(Expansion, expansion).layer = layer
    attention._paged_latents = layer  # type: ignore[assignment]


def absorbed_attention(
    query: torch.Tensor,
    weight: torch.Tensor,
    plain: int,
    attend: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Attention in the absorbed form.

    Args:
        query: [tokens, heads, plain + rotary].
        weight: [heads * (plain + value_dim), rank], as in `LatentLayer`.
        plain: See `LatentLayer`.
        attend: Attends to latents. It takes queries of the latents, [tokens, heads, rank], and of the rotary part,
            [tokens, heads, rotary]. It returns [tokens, heads, rank].
        multiply: `AttentionBackend.multiply`.

    Returns:
        [tokens, heads, value_dim].
    """
    # Under autocast the weights are wider than queries.
    parts = weight.to(query.dtype).view(query.shape[1], -1, weight.shape[1])
    mixed = attend(multiply(query[..., :plain], parts[:, :plain]), query[..., plain:])
    return multiply(mixed, parts[:, plain:].transpose(1, 2))


def multiply_by_heads(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`AttentionBackend.multiply` by torch."""
    out = x.new_empty(x.shape[0], x.shape[1], weight.shape[2])
    torch.bmm(x.transpose(0, 1), weight, out=out.transpose(0, 1))
    return out
