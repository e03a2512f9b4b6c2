"""Keys and values in pages, and the states of rows beside them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from hf_async_batching.kv_cache.layer_groups import LayerGroups, LayerShape
from hf_async_batching.kv_cache.lazy_zeros import lazy_zeros
from hf_async_batching.kv_cache.state_tables import StateShape, StateTables


class PagedCache:
    """The KV cache: a pair of tensors per layer, or per place in a group of layers; groups share these tensors.

    Args:
        layers: Shape of each attention layer, in order of layer index.
        num_pages: Pages that requests can own; there is one more, page 0, for padding.
        page_size: Tokens per page.
        device: Device of the pages.
        groups: The groups of layers that share a page; None for one group of all layers.

    Attributes:
        keys: [pages, page_size, num_kv_heads, key_dim] per layer.
        values: [pages, page_size, num_kv_heads, value_dim] per layer; views of the keys in layers that keep latents.
        group_of: The group of each layer; None if there is one group.
    """

    def __init__(
        self,
        layers: list[LayerShape],
        *,
        num_pages: int,
        page_size: int,
        device: torch.device,
        groups: LayerGroups | None = None,
    ) -> None:
        def pages(layer: LayerShape, dim: int) -> torch.Tensor:
            return lazy_zeros(num_pages + 1, page_size, layer.num_kv_heads, dim, dtype=layer.dtype, device=device)

        place_of = list(range(len(layers))) if groups is None else groups.place_of
        firsts = [place_of.index(place) for place in range(max(place_of, default=-1) + 1)]
        keys = [pages(layers[i], layers[i].key_dim) for i in firsts]
        values = [
            key[..., : layers[i].value_dim] if layers[i].values_in_keys else pages(layers[i], layers[i].value_dim)
            for i, key in zip(firsts, keys, strict=True)
        ]
        self.page_size = page_size
        self.keys = [keys[place] for place in place_of]
        self.values = [values[place] for place in place_of]
        self.group_of = groups.group_of if groups is not None and groups.count > 1 else None
        own = [value for i, value in zip(firsts, values, strict=True) if not layers[i].values_in_keys]
        self.num_bytes = sum(tensor.nbytes for tensor in (*keys, *own))
        self._device = device
        self._states: StateTables | None = None

    def states(self, num_rows: int, shapes: Mapping[Hashable, StateShape], num_snapshots: int = 0) -> StateTables:
        """The tables of the rows' states; made in the first call, and anew for another number of rows.

        Args:
            num_rows: Rows of the tables, the padding row included.
            shapes: The states.
            num_snapshots: Places for snapshots if the tables are made.

        Raises:
            RuntimeError: The number of rows differs, and the tables hold snapshots, which would be lost.
        """
        if self._states is None or self._states.num_rows != num_rows:
            if self._states is not None and self._states.num_snapshots:
                raise RuntimeError(f"the states of {self._states.num_rows} rows are asked for as those of {num_rows}")
            self._states = StateTables(num_rows, self._device, shapes, num_snapshots)
        return self._states
