"""Group the layers of a model that share a page: layers that see equally far. Running this code needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

# With more groups, a step would send too many page-table entries.
_MOST_GROUPS = 16
# Largest share of a page's memory that may be wasted if groups have unequal numbers of layers.
_MOST_WASTE = 0.15
# Smallest share of layers with a window for which separate groups are worth the host's extra work.
_FEWEST_NARROW = 0.25


class LayerShape(NamedTuple):
    """One attention layer, as the probe saw it: its keys and values, its query heads, and how far its queries see.

    A layer that keeps latents has one key-value head: its keys are a latent and then the rotary part of the keys, and
    its values are the latent within them (`values_in_keys`).
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    num_heads: int = 0
    sliding_window: int | None = None
    chunk: int | None = None
    has_sinks: bool = False
    values_in_keys: bool = False

    @property
    def bytes_per_token(self) -> int:
        """Memory of one token's keys and values in this layer, in bytes."""
        numbers = self.key_dim + (0 if self.values_in_keys else self.value_dim)
        return self.num_kv_heads * numbers * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """The groups of layers that share a page.

    If some layers see all tokens and others only a window, a page of all layers would stay as long as the former need
    it. Each group of layers then has separate pages, all of one size, and pages of window layers are released when the
    window has passed them. (vLLM's hybrid KV cache manager has groups of equal size over one pool.)

    Attributes:
        group_of: The group of each layer; groups that see all tokens come first.
        place_of: Index of each layer in its group's pages.
        count: Number of groups.
        full_attention_groups: Number of leading groups that see all tokens.
        window: Number of last tokens, its own included, that a token sees in the layers of the other groups; None if
            they see all tokens too.
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
    """Group the layers of a model.

    Args:
        layers: The layers, in order.
        apart: Whether there may be more than one group.
        longest: Longest sequence of a request, in tokens; None if unknown.
    """
    windows = [layer.sliding_window for layer in layers]
    narrow = [i for i, window in enumerate(windows) if window is not None]
    wide = [i for i, window in enumerate(windows) if window is None]
    window = max([window for window in windows if window is not None], default=None)
    sizes = {
        (layer.num_kv_heads, layer.key_dim, layer.value_dim, layer.dtype, layer.values_in_keys) for layer in layers
    }
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
