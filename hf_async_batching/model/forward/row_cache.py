"""Present the keys, values and states of rows as a cache object of the model's own family.

transformers' `DynamicCache` is a list of layers. Each layer has keys and values that grow, states of a fixed size, or
both. Here, keys and values live in the engine's pages, and states in tables indexed by row. For a step they are
gathered into a cache object of the family's own class, with rows of different lengths padded on the left as `generate`
pads them. Then the entries that the step adds are written back.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import cache_utils

from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.kv_cache.layer_groups import LayerShape
from hf_async_batching.kv_cache.paged_cache import PagedCache

_KNOWN_LAYERS = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DynamicIndexedLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
)
_STATES = ("conv_states", "recurrent_states")


@dataclass(frozen=True, slots=True)
class _Paged:
    """Location of one layer's keys and values: their index in the `PagedCache`."""

    layer: int
    index: int
    kind: str  # "attention" or "indexer"


class RowCache:
    """Loads rows into a cache object of the model's family, and stores what a step adds.

    Args:
        pristine: A cache as `generate` makes it, before any step.
        used: The same cache after a step of one sequence of `length` tokens.
        length: Tokens of that sequence.

    Attributes:
        shapes: Shapes of keys and values of each layer that has any, for the pages.
        state_bytes: Memory of the states of one row, in bytes.

    Raises:
        UnsupportedModelError: The cache is not a `DynamicCache`, or has layers of an unknown class.
    """

    def __init__(self, pristine: Any, used: Any, length: int) -> None:
        if type(used) is not cache_utils.DynamicCache:
            raise UnsupportedModelError(f"it keeps its state in a {type(used).__name__}")
        known = {getattr(cache_utils, name) for name in _KNOWN_LAYERS if hasattr(cache_utils, name)}
        self._pristine = pristine
        self._template = used
        self._paged: list[_Paged] = []
        self._states: list[tuple[int, str, int]] = []
        self.shapes: list[LayerShape] = []
        self.state_bytes = 0
        layer: Any
        for number, layer in enumerate(used.layers):
            if type(layer) not in known:
                raise UnsupportedModelError(f"its cache has layers of the class {type(layer).__name__}")
            keys: Any = getattr(layer, "keys", None)
            values: Any = getattr(layer, "values", None)
            if keys is not None and keys.numel():
                window = getattr(layer, "sliding_window", None) if layer.is_sliding else None
                kept = length if window is None else min(length, window - 1)
                if keys.shape[-2] != kept or keys.dim() != 4 or keys.shape[:3] != values.shape[:3]:
                    raise UnsupportedModelError("its cache holds other entries than the tokens of the input")
                paged = _Paged(number, len(self.shapes), "attention")
                self._add(paged, keys.transpose(1, 2), values.transpose(1, 2), window)
            indexer = getattr(layer, "indexer_keys", None)
            if indexer is not None and indexer.numel():
                if indexer.dim() != 3 or indexer.shape[1] != length or layer.indexer_position_ids is not None:
                    raise UnsupportedModelError("its indexer does not keep exactly one key per token")
                self._add(_Paged(number, len(self.shapes), "indexer"), indexer[:, :, None], indexer[:, :, None, :0])
            for name in _STATES:
                for index, state in (getattr(layer, name, None) or {}).items():
                    if state is not None:
                        self._states.append((number, name, index))
                        self.state_bytes += state.nbytes
        self._tables: list[torch.Tensor] = []

    def _add(self, paged: _Paged, keys: torch.Tensor, values: torch.Tensor, window: int | None = None) -> None:
        """Add a layer's keys and values, each [1, length, heads, dim]."""
        self._paged.append(paged)
        shape = LayerShape(keys.shape[2], keys.shape[3], values.shape[3], keys.dtype, sliding_window=window)
        self.shapes.append(shape)

    def allocate(self, num_rows: int) -> None:
        """Allocate new tables of states, for rows below `num_rows`."""
        self._tables = []
        for number, name, index in self._states:
            state = getattr(self._template.layers[number], name)[index]
            self._tables.append(state.new_zeros(num_rows, *state.shape[1:]))

    def load(self, rows: torch.Tensor, starts: list[int], page_table: torch.Tensor, pages: PagedCache) -> StepCache:
        """Return a cache that holds the keys, values and states of these rows.

        Args:
            rows: int64 [batch].
            starts: Number of tokens that each row has: 0 for all rows, or above 0 for all.
            page_table: int32 [rows, max_pages_per_row].
            pages: The engine's keys and values.
        """
        cache = copy.deepcopy(self._pristine)
        length = max(starts)
        if length:
            template = self._template.layers
            while len(cache.layers) < len(template):
                cache.layers.append(copy.copy(template[len(cache.layers)]))
            for layer, used in zip(cache.layers, template, strict=True):
                vars(layer).update(_flags(used))
            self._load_pages(cache, rows, starts, page_table, pages)
            for table, (number, name, index) in zip(self._tables, self._states, strict=True):
                getattr(cache.layers[number], name)[index] = table[rows]
        return StepCache(cache)

    def _load_pages(
        self, cache: Any, rows: torch.Tensor, starts: list[int], page_table: torch.Tensor, pages: PagedCache
    ) -> None:
        length, size = max(starts), pages.page_size
        begins = torch.tensor([start - length for start in starts], device=rows.device)
        positions = torch.arange(length, device=rows.device) + begins[:, None]
        padding = None if min(starts) == length else positions < 0
        positions = positions.clamp(min=0)
        slots = page_table[rows].long().gather(1, positions // size) * size + positions % size
        for paged in self._paged:
            layer = cache.layers[paged.layer]
            first = 0
            if paged.kind == "attention" and layer.is_sliding:
                layer.cumulative_length = length
                first = length - min(length, layer.sliding_window - 1)
            keys = _gather(pages.keys[paged.index], slots[:, first:], padding, first)
            if paged.kind == "indexer":
                layer.indexer_keys = keys[:, :, 0]
                continue
            values = _gather(pages.values[paged.index], slots[:, first:], padding, first)
            layer.keys, layer.values = keys.transpose(1, 2), values.transpose(1, 2)

    def store(
        self, step: StepCache, rows: torch.Tensor, starts: list[int], page_table: torch.Tensor, pages: PagedCache
    ) -> None:
        """Write back what a step added; the arguments are those of `load`.

        Raises:
            UnsupportedModelError: The step added something other than one key and one value per token.
        """
        size = pages.page_size
        begins = torch.tensor(starts, device=rows.device)[:, None]
        for paged in self._paged:
            if paged.kind == "indexer":
                total = step.cache.layers[paged.layer].indexer_keys
                keys = total[:, max(starts) :, None]
                values = keys[..., :0]
            else:
                added = step.added.get(paged.layer)
                if added is None:
                    raise UnsupportedModelError("its layers do not use their cache in every step")
                keys, values = (tensor.transpose(1, 2) for tensor in added)
            positions = begins + torch.arange(keys.shape[1], device=rows.device)
            slots = (page_table[rows].long().gather(1, positions // size) * size + positions % size).flatten()
            for target, source in ((pages.keys[paged.index], keys), (pages.values[paged.index], values)):
                target.flatten(0, 1)[slots] = source.flatten(0, 1)
        for table, (number, name, index) in zip(self._tables, self._states, strict=True):
            table[rows] = getattr(step.cache.layers[number], name)[index]


class StepCache:
    """A cache object for one step, and what the step adds to it.

    Attributes:
        cache: The cache that the model gets.
        added: Keys and values [batch, heads, tokens, dim] by layer.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.added: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # Replaced on this object only.
        cache.update = partial(self._update, cache.update)

    def _update(
        self, update: Any, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kw: Any
    ) -> Any:
        if layer_idx in self.added:
            raise UnsupportedModelError("its layers write to their cache more than once per step")
        self.added[layer_idx] = key_states, value_states
        return update(key_states, value_states, layer_idx, *args, **kw)


def _flags(layer: Any) -> dict[str, Any]:
    """Attributes, other than its tensors, of a layer that has seen tokens."""
    tensors = ("keys", "values", "indexer_keys")
    return {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in vars(layer).items()
        if name not in tensors
    }


def _gather(store: torch.Tensor, slots: torch.Tensor, padding: torch.Tensor | None, first: int) -> torch.Tensor:
    """Tensor [batch, tokens, heads, dim] at `slots` [batch, tokens]; zeros where a row has no token."""
    gathered = store.flatten(0, 1)[slots]
    if padding is not None:
        gathered.masked_fill_(padding[:, first:, None, None], 0)
    return gathered
