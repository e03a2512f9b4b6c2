"""The states that rows have besides their pages: convolution windows, and recurrent states of linear attention."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple

import torch

from hf_async_batching.core.plan import StateCopy
from hf_async_batching.kv_cache.lazy_zeros import lazy_zeros

_ALIGNMENT = 64
"""Bytes; kernels read whole vectors of the smallest dtype from places that are aligned so."""
_WORD = torch.int64
"""What a copy moves at once; every other dtype is read through a view."""


class StateShape(NamedTuple):
    """Shape of one state of one row, without a dimension for rows, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Memory of one row, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class StateTables:
    """One table per state, indexed by row. Row 0 is the padding row; no request reads its states.

    Without `shapes`, a table is made when it is first asked for. A row that starts at position 0 starts from
    zeros, so that a table needs no clearing between two requests.

    With `shapes`, states of one shape are in one buffer, one table behind the other: a row is copied by one launch for
    each shape. Places for snapshots (see `state_snapshots`) follow each table's rows.

    Args:
        num_rows: Rows of each table, the padding row included.
        device: Device of the tables.
        shapes: The states; tables are made for all of them at once, and for no other.
        num_snapshots: Places for snapshots; only with `shapes`.

    Attributes:
        shapes: Shape of each state that has a table.
        num_rows: The argument.
        num_snapshots: The argument.
    """

    def __init__(
        self,
        num_rows: int,
        device: torch.device,
        shapes: Mapping[Hashable, StateShape] | None = None,
        num_snapshots: int = 0,
    ) -> None:
        self.shapes: dict[Hashable, StateShape] = {}
        self.num_rows = num_rows
        self.num_snapshots = num_snapshots
        self._device = device
        self._tables: dict[Hashable, torch.Tensor] = {}
        self._buffers: list[torch.Tensor] | None = None
        if shapes is not None:
            self._make_all(shapes)

    def _make_all(self, shapes: Mapping[Hashable, StateShape]) -> None:
        alike: dict[StateShape, list[Hashable]] = {}
        for key, state in shapes.items():
            alike.setdefault(StateShape(tuple(state.shape), state.dtype), []).append(key)
        rows = self.num_rows + self.num_snapshots
        self._buffers = []
        for state, keys in alike.items():
            words = -(-state.num_bytes // _ALIGNMENT) * _ALIGNMENT // _WORD.itemsize
            # A table's rows are next to each other: spread over gigabytes, they would miss the cache of addresses.
            buffer = lazy_zeros(len(keys), rows, words, dtype=_WORD, device=self._device)
            self._buffers.append(buffer)
            for key, places in zip(keys, buffer.view(state.dtype), strict=True):
                values = places[: self.num_rows, : math.prod(state.shape)]
                self._tables[key] = values.view(self.num_rows, *state.shape)
        self.shapes = dict(shapes)

    def table(self, key: Hashable, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The table [rows, *shape] of a state; only the first dimension may have gaps between its elements.

        Args:
            key: Name of the state; equal in every step.
            shape: Shape of one row's state.
            dtype: Dtype of the state.

        Raises:
            KeyError: The tables' shapes were given, without this state. A new table would forget all rows.
        """
        found = self._tables.get(key)
        if found is None:
            if self._buffers is not None:
                raise KeyError(f"no row has a state {key!r}")
            found = torch.zeros(self.num_rows, *shape, dtype=dtype, device=self._device)
            self._tables[key] = found
            self.shapes[key] = StateShape(shape, dtype)
        return found

    def copy(self, copies: Iterable[StateCopy]) -> None:
        """Copy all states of some rows or snapshots to others, one after the other, on the current stream."""
        assert self._buffers is not None
        for source, target in copies:
            # Numbers below 0 count from the end, where the snapshots are.
            for buffer in self._buffers:
                buffer[:, target].copy_(buffer[:, source])

    @property
    def num_bytes(self) -> int:
        """Memory of the rows' states, in bytes."""
        return sum(table.nbytes for table in self._tables.values())
