"""Keys and values in pages, one pair of tensors per attention layer."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LayerShape(NamedTuple):
    """One attention layer, as the probe saw it: its keys and values, how many heads ask, and how far they see."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    num_heads: int = 0
    sliding_window: int | None = None
    chunk: int | None = None
    has_sinks: bool = False

    @property
    def bytes_per_token(self) -> int:
        """Memory of one token's keys and values in this layer, in bytes."""
        return self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


def common_window(layers: list[LayerShape]) -> int | None:
    """How many of the last tokens the layers see: the widest window; None where one of them sees all."""
    windows = [layer.sliding_window for layer in layers]
    return None if not windows or None in windows else max(window for window in windows if window is not None)


class PagedCache:
    """The KV cache.

    Args:
        layers: Shape of each attention layer, in order of layer index.
        num_pages: Pages that requests can own; there is one more, page 0, for padding.
        page_size: Tokens per page.
        device: Where the pages live.

    Attributes:
        keys: Per layer [pages, page_size, num_kv_heads, key_dim].
        values: Per layer [pages, page_size, num_kv_heads, value_dim].
    """

    def __init__(self, layers: list[LayerShape], *, num_pages: int, page_size: int, device: torch.device) -> None:
        def pages(layer: LayerShape, dim: int) -> torch.Tensor:
            return torch.zeros(num_pages + 1, page_size, layer.num_kv_heads, dim, dtype=layer.dtype, device=device)

        self.page_size = page_size
        self.keys = [pages(layer, layer.key_dim) for layer in layers]
        self.values = [pages(layer, layer.value_dim) for layer in layers]

    @property
    def num_bytes(self) -> int:
        """Memory of all pages, in bytes."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))
