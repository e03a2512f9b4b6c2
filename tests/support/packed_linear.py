"""A linear layer as GPTQ and AWQ checkpoints hold it: 4-bit weights packed eight to an int32, in buffers."""

from __future__ import annotations

import torch
from torch import nn

GROUP = 32


class PackedLinear(nn.Module):
    """The structure of their layers: no parameter, packed buffers, and a plain tensor made beside them.

    Buffers: qweight int32 [in / 8, out], qzeros int32 [groups, out / 8], scales [groups, out], g_idx int32 [in].
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        weight = linear.weight.detach().t().reshape(-1, GROUP, linear.out_features)
        low, high = weight.amin(1), weight.amax(1)
        scales = (high - low).clamp(min=1e-8) / 15
        zeros = (-low / scales).round().clamp(0, 15)
        levels = (weight / scales[:, None] + zeros[:, None]).round().clamp(0, 15).to(torch.int32)
        self.register_buffer("qweight", pack(levels.reshape(linear.in_features, -1), 0))
        self.register_buffer("qzeros", pack(zeros.to(torch.int32), 1))
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", torch.arange(linear.in_features, dtype=torch.int32) // GROUP)
        # Not registered, as in some of their layers.
        self.wf = torch.arange(0, 32, 4, dtype=torch.int32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = (self.qweight[:, None] >> self.wf[None, :, None] & 15).reshape(self.infeatures, -1)
        zeros = (self.qzeros[:, :, None] >> self.wf & 15).reshape(self.scales.shape)
        group = self.g_idx.long()
        return x @ ((levels - zeros[group]) * self.scales[group]).to(x.dtype)


def pack(levels: torch.Tensor, dim: int) -> torch.Tensor:
    """Eight 4-bit numbers of `dim` in each int32."""
    levels = levels.unflatten(dim, (-1, 8)).movedim(dim + 1, -1)
    return (levels << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1).to(torch.int32)


def pack_linears(model: nn.Module) -> None:
    """Replace the linear layers of a model's decoder."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(module, name, PackedLinear(child))
