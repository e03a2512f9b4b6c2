"""Rows reach the caller in their order."""

from __future__ import annotations

from hf_async_batching.dataset.rows.row import RowResult
from hf_async_batching.dataset.run.consumer import in_order


def test_each_row_is_released_after_its_use_in_order() -> None:
    released: list[int] = []
    rows = in_order((RowResult(index) for index in (2, 0, 1, 3)), released.append)
    seen = []
    for row in rows:
        assert released == seen, "the row in use is not released yet"
        seen.append(row.index)
    assert seen == released == [0, 1, 2, 3]
