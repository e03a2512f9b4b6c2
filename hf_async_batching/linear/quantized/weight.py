"""What a product needs to know of a quantized weight."""

from __future__ import annotations

from typing import NamedTuple

import torch


class QuantizedWeight(NamedTuple):
    """A weight [outputs, inputs] in few bits, in the tensors of the layer that holds it.

    Attributes:
        form: How values are kept, a key of `forms.FORMS`.
        packed: The values.
        scales: What the values are multiplied by, and tables; the form says in which order.
        outputs: Rows of the weight.
        inputs: Columns of the weight.
        group: Neighbouring columns that share a scale.
        dtype: Dtype in which the layer computes; None for its input's.
    """

    form: str
    packed: torch.Tensor
    scales: tuple[torch.Tensor, ...]
    outputs: int
    inputs: int
    group: int
    dtype: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.packed.nbytes + sum(scale.nbytes for scale in self.scales)
