"""The states that rows have besides their pages: convolution windows, and recurrent states of linear attention."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple

import torch

from hf_async_batching.core.plan import StateCopy

_ALIGNMENT = 64
"""Bytes; kernels read whole vectors of the smallest dtype from places that are aligned so."""


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

    With `shapes`, all states of a row are together in memory, so that a row is copied at once. Places for snapshots
    (see `state_snapshots`) follow the rows.

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
        self._memory: torch.Tensor | None = None
        if shapes is not None:
            self._make_all(shapes)

    def _make_all(self, shapes: Mapping[Hashable, StateShape]) -> None:
        starts: dict[Hashable, int] = {}
        end = 0
        for key, state in shapes.items():
            starts[key] = end
            end += -(-state.num_bytes // _ALIGNMENT) * _ALIGNMENT
        memory = torch.zeros(self.num_rows + self.num_snapshots, end, dtype=torch.uint8, device=self._device)
        for key, (shape, dtype) in shapes.items():
            start, length = starts[key] // dtype.itemsize, math.prod(shape)
            values = memory[: self.num_rows].view(dtype)[:, start : start + length]
            self._tables[key] = values.view(self.num_rows, *shape)
        self.shapes, self._memory = dict(shapes), memory

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
            if self._memory is not None:
                raise KeyError(f"no row has a state {key!r}")
            found = torch.zeros(self.num_rows, *shape, dtype=dtype, device=self._device)
            self._tables[key] = found
            self.shapes[key] = StateShape(shape, dtype)
        return found

    def copy(self, copies: Iterable[StateCopy]) -> None:
        """Copy all states of some rows or snapshots to others, one after the other, on the current stream."""
        assert self._memory is not None
        for source, target in copies:
            # Numbers below 0 count from the end, where the snapshots are.
            self._memory[target].copy_(self._memory[source])

    @property
    def num_bytes(self) -> int:
        """Memory of the rows' states, in bytes."""
        return sum(table.nbytes for table in self._tables.values())
