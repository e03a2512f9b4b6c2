"""What one layer of experts computes: its weights in the family's layout, and its activation."""

from __future__ import annotations

from typing import NamedTuple

import torch

GROUP = 32
"""Neighbours along the inner dimension that share one scale in MXFP4."""


class GateForm(NamedTuple):
    """What a layer of experts does between its two products.

    Gated: `act(min(gate, limit)) * (clamp(up, -limit, limit) + shift)`. Otherwise: `act(up)`.

    Attributes:
        activation: "silu", "gelu", "gelu_tanh", "relu" or "relu2".
        gated: Whether the first product computes gates, too.
        interleaved: Whether gates and inputs take turns; otherwise all gates come first.
        alpha: Factor within SiLU's sigmoid.
        limit: The clamp; 0 for none.
        shift: What is added to the input of a gate.
    """

    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = 0.0
    shift: float = 0.0


class ExpertWeights(NamedTuple):
    """Weights of all experts of a layer, where the model keeps them.

    With scales the weights are MXFP4 (OCP Microscaling Formats, v1.0): uint8 [experts, outputs, groups, 16], two e2m1
    values in a byte, the even one in the low bits. A group of 32 values has one scale, 2 ** (scale - 127). Such
    weights are not transposed, and have biases in the dtype of activations.

    Attributes:
        up: [experts, outputs, hidden], with twice as many outputs if gated; transposed: [experts, hidden, outputs].
        up_bias: [experts, outputs], or None.
        down: [experts, hidden, intermediate]; transposed: [experts, intermediate, hidden].
        down_bias: [experts, hidden], or None.
        transposed: Whether the last dimension counts outputs.
        up_scales: None, or uint8 [experts, outputs, groups].
        down_scales: None, or uint8 [experts, hidden, groups].
    """

    up: torch.Tensor
    up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    transposed: bool
    up_scales: torch.Tensor | None = None
    down_scales: torch.Tensor | None = None

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.down.shape[0]

    @property
    def hidden(self) -> int:
        """Size of a token."""
        return self.down.shape[2 if self.transposed else 1]

    @property
    def intermediate(self) -> int:
        """Size of an expert."""
        return self.down.shape[1 if self.transposed else 2] * (GROUP if self.packed else 1)

    @property
    def packed(self) -> bool:
        """Whether the weights are MXFP4."""
        return self.down_scales is not None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations."""
        return self.down.dtype if self.down_bias is None or not self.packed else self.down_bias.dtype
