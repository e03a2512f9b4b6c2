"""What every form of quantized weights can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from hf_async_batching.linear.quantized.weight import QuantizedWeight

Setting = tuple[Any, ...]
"""A named tuple of numbers and words; each form has its own. Its first entry is the way in which it computes."""

LIBRARY = "library"
"""The way that stands for the layer's own product."""


class Form(ABC):
    """A way to keep weights in few bits, with products that read them in place.

    Attributes:
        most_rows: Beyond this many rows the layer's own product computes.
    """

    most_rows = 64

    @abstractmethod
    def own(self, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """The product as the layer's own forward computes it, from tensors alone: [..., inputs] to [..., outputs]."""

    @abstractmethod
    def values(self, weight: QuantizedWeight) -> torch.Tensor:
        """The weight in float32 [outputs, inputs], by torch: the reference."""

    @abstractmethod
    def serves(self, x: torch.Tensor, weight: QuantizedWeight) -> bool:
        """Whether the kernels can compute a product of `x` [..., inputs] with at most `most_rows` rows."""

    @abstractmethod
    def few(
        self,
        x: torch.Tensor,
        weight: QuantizedWeight,
        bias: torch.Tensor | None,
        counters: torch.Tensor,
        setting: Setting,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        """The product of few rows by our kernel, with a residual [..., outputs] added to the rounded product."""

    @abstractmethod
    def choices(self, rows: int, weight: QuantizedWeight) -> tuple[Setting, list[Setting]]:
        """The setting by rule, and settings worth measuring, for a number of rows of `tuned_rows`."""

    @abstractmethod
    def sources(self) -> tuple[str, ...]:
        """Files that a measurement of a setting depends on."""

    def tuned_rows(self, rows: int) -> int:
        """The number of rows whose settings serve `rows` rows."""
        return 1 << (rows - 1).bit_length()
