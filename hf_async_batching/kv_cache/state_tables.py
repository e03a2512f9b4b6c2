"""The states that rows have besides their pages: convolution windows, and recurrent states of linear attention."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch


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

    Args:
        num_rows: Rows of each table, the padding row included.
        device: Device of the tables.
        shapes: The states; tables are made for all of them at once, and for no other.

    Attributes:
        shapes: Shape of each state that has a table.
        num_rows: The argument.
    """

    def __init__(
        self, num_rows: int, device: torch.device, shapes: Mapping[Hashable, StateShape] | None = None
    ) -> None:
        self.shapes: dict[Hashable, StateShape] = {}
        self.num_rows = num_rows
        self._device = device
        self._tables: dict[Hashable, torch.Tensor] = {}
        self._complete = False
        for key, (shape, dtype) in (shapes or {}).items():
            self.table(key, shape, dtype)
        self._complete = shapes is not None

    def table(self, key: Hashable, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The table [rows, *shape] of a state.

        Args:
            key: Name of the state; equal in every step.
            shape: Shape of one row's state.
            dtype: Dtype of the state.

        Raises:
            KeyError: The tables' shapes were given, without this state. A new table would forget all rows.
        """
        found = self._tables.get(key)
        if found is None:
            if self._complete:
                raise KeyError(f"no row has a state {key!r}")
            found = torch.zeros(self.num_rows, *shape, dtype=dtype, device=self._device)
            self._tables[key] = found
            self.shapes[key] = StateShape(shape, dtype)
        return found

    @property
    def num_bytes(self) -> int:
        """Memory of all tables, in bytes."""
        return sum(table.nbytes for table in self._tables.values())
