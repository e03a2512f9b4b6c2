"""Which layers of a model share a page: groups of layers that see equally far. No torch when it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

# Beyond, a step would send too many entries of page tables.
_MOST_GROUPS = 16
# Of a page's memory, where the layers do not come out even.
_MOST_WASTE = 0.15
# Of the layers, for so many more pages to be worth the host's while.
_FEWEST_NARROW = 0.25


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


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """Which layers share a page.

    Where some layers see all tokens and others a window, a page of all layers would have to stay for the sake of the
    former. There each group of layers has pages of its own, all of one size, and those of the latter go when the
    window has passed them. (Groups of equal size over one pool are vLLM's hybrid KV cache manager.)

    Attributes:
        group_of: The group of each layer; those that see all come first.
        place_of: Its place in the group's pages.
        count: Groups.
        full_attention_groups: How many of the first of them see all.
        window: How many of the last tokens, its own included, a token sees in the layers of the others; None where
            these see all, too.
    """

    group_of: list[int]
    place_of: list[int]
    count: int
    full_attention_groups: int
    window: int | None

    def page_bytes(self, layers: list[LayerShape], page_size: int) -> int:
        """Memory of a page, in bytes."""
        places = {place: layer.bytes_per_token for place, layer in zip(self.place_of, layers, strict=True)}
        return page_size * sum(places.values())


def group_layers(layers: list[LayerShape], apart: bool = True, longest: int | None = None) -> LayerGroups:
    """The groups of a model's layers.

    Args:
        layers: In order.
        apart: Whether there may be more than one.
        longest: Tokens that a request can reach; None where unknown.
    """
    windows = [layer.sliding_window for layer in layers]
    narrow = [i for i, window in enumerate(windows) if window is not None]
    wide = [i for i, window in enumerate(windows) if window is None]
    window = max([window for window in windows if window is not None], default=None)
    sizes = {(layer.num_kv_heads, layer.key_dim, layer.value_dim, layer.dtype) for layer in layers}
    pays = window is not None and window < (longest or math.inf) and len(narrow) >= _FEWEST_NARROW * len(layers)
    if apart and pays and wide and len(sizes) == 1:
        size = min(len(narrow), len(wide))
        full, others = -(-len(wide) // size), -(-len(narrow) // size)
        count = full + others
        if count <= _MOST_GROUPS and 1 - len(layers) / (count * size) <= _MOST_WASTE:
            group_of, place_of = [0] * len(layers), [0] * len(layers)
            for first, members in ((0, wide), (full, narrow)):
                for number, layer in enumerate(members):
                    group_of[layer], place_of[layer] = first + number // size, number % size
            return LayerGroups(group_of, place_of, count, full, window)
    all_narrow = bool(narrow) and not wide
    return LayerGroups(
        [0] * len(layers), list(range(len(layers))), 1, int(not all_narrow), window if all_narrow else None
    )
