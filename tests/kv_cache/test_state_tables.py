"""Tables of the states of rows."""

from __future__ import annotations

import pytest
import torch

from hf_async_batching.core.plan import StateCopy
from hf_async_batching.kv_cache.paged_cache import PagedCache
from hf_async_batching.kv_cache.state_tables import StateShape, StateTables

CPU = torch.device("cpu")
SHAPES = {(0, "conv"): StateShape((6, 3), torch.bfloat16), (0, "scan"): StateShape((2, 4, 5), torch.float32)}


def test_a_state_knows_its_size() -> None:
    assert [state.num_bytes for state in SHAPES.values()] == [36, 160]
    assert StateShape((), torch.float32).num_bytes == 4


def test_a_table_is_made_when_it_is_first_asked_for() -> None:
    tables = StateTables(4, CPU)
    assert tables.num_bytes == 0 and not tables.shapes
    made = tables.table("a", (2, 3), torch.float32)
    assert made.shape == (4, 2, 3) and made.dtype == torch.float32 and not made.any()
    assert tables.table("a", (2, 3), torch.float32) is made
    other = tables.table("b", (5,), torch.bfloat16)
    assert other.shape == (4, 5) and other.dtype == torch.bfloat16
    assert tables.shapes == {"a": StateShape((2, 3), torch.float32), "b": StateShape((5,), torch.bfloat16)}
    assert tables.num_bytes == 4 * (24 + 10)


def test_shapes_name_tables_to_make_at_once() -> None:
    tables = StateTables(7, CPU, SHAPES)
    assert tables.shapes == SHAPES
    assert tables.num_rows == 7
    assert tables.num_bytes == 7 * (36 + 160)
    made = {key: tables.table(key, *state) for key, state in SHAPES.items()}
    assert tables.num_bytes == 7 * (36 + 160), "nothing was made again"
    assert [tuple(table.shape) for table in made.values()] == [(7, 6, 3), (7, 2, 4, 5)]
    again = StateTables(3, CPU, tables.shapes)
    assert again.shapes == SHAPES


def test_tables_that_are_complete_get_no_other() -> None:
    """Else a step that names a state otherwise would begin all rows anew, and say nothing."""
    tables = StateTables(7, CPU, SHAPES)
    with pytest.raises(KeyError, match="no row has a state 'other'"):
        tables.table("other", (2,), torch.float32)
    with pytest.raises(KeyError):
        StateTables(7, CPU, {}).table("other", (2,), torch.float32)


def test_a_cache_keeps_its_tables_for_a_number_of_rows() -> None:
    cache = PagedCache([], num_pages=2, page_size=16, device=CPU)
    assert cache.num_bytes == 0
    tables = cache.states(5, SHAPES)
    assert tables.num_rows == 5 and tables.shapes == SHAPES
    tables.table((0, "conv"), *SHAPES[0, "conv"])[2] = 1
    assert cache.states(5, SHAPES) is tables
    other = cache.states(3, SHAPES)
    assert other is not tables and other.num_rows == 3
    assert not other.table((0, "conv"), *SHAPES[0, "conv"]).any()
    assert cache.states(3, SHAPES) is other


def test_two_caches_share_no_tables() -> None:
    first, second = (PagedCache([], num_pages=2, page_size=16, device=CPU) for _ in range(2))
    assert first.states(5, SHAPES) is not second.states(5, SHAPES)


# -- rows and snapshots that are copied -------------------------------------------------------------------------------


def fill(tables: StateTables, row: int, value: int) -> None:
    for key, state in SHAPES.items():
        tables.table(key, *state)[row] = value


def values(tables: StateTables) -> list[list[float]]:
    """The values of each row, in each table."""
    found = [tables.table(key, *state).flatten(1).float() for key, state in SHAPES.items()]
    assert all((table == table[:, :1]).all() for table in found)
    return [table[:, 0].tolist() for table in found]


def test_all_states_of_a_row_are_copied_at_once() -> None:
    tables = StateTables(4, CPU, SHAPES, 2)
    fill(tables, 1, 5)
    tables.copy([StateCopy(1, 3)])
    assert values(tables) == [[0, 5, 0, 5]] * 2


def test_snapshots_are_behind_the_rows() -> None:
    tables = StateTables(4, CPU, SHAPES, 2)
    assert [len(tables.table(key, *state)) for key, state in SHAPES.items()] == [4, 4]
    fill(tables, 1, 5)
    fill(tables, 2, 7)
    # In order: the second place is overwritten, and read afterwards.
    tables.copy([StateCopy(1, -1), StateCopy(1, -2), StateCopy(2, -2), StateCopy(-2, 1)])
    fill(tables, 2, 0)
    tables.copy((StateCopy(-1, 3),))
    assert values(tables) == [[0, 7, 0, 5]] * 2


def test_tables_are_aligned_and_only_rows_have_gaps() -> None:
    shapes = {
        "a": StateShape((3,), torch.bfloat16),
        "b": StateShape((2, 5), torch.float32),
        "c": StateShape((), torch.float64),
    }
    tables = StateTables(3, CPU, shapes, 1)
    for number, (key, (shape, dtype)) in enumerate(shapes.items()):
        table = tables.table(key, shape, dtype)
        assert (table.shape, table.dtype) == ((3, *shape), dtype)
        assert table[1].is_contiguous() and table.data_ptr() % 64 == tables.table("a", *shapes["a"]).data_ptr() % 64
        assert table.stride(0) * dtype.itemsize == 64, "a table's rows are next to each other"
        table[1] = number + 1
    tables.copy([StateCopy(1, 2)])
    assert [tables.table(key, *state)[2].flatten()[0] for key, state in shapes.items()] == [1, 2, 3]


def test_a_cache_makes_places_with_its_tables() -> None:
    cache = PagedCache([], num_pages=2, page_size=16, device=CPU)
    tables = cache.states(5, SHAPES, 3)
    assert cache.states(5, SHAPES) is tables
    with pytest.raises(RuntimeError, match="5 rows are asked for as those of 4"):
        cache.states(4, SHAPES)
    fill(tables, 1, 9)
    tables.copy([StateCopy(1, -3), StateCopy(-3, 4)])
    assert values(tables)[0] == [0, 9, 0, 0, 9]
    with pytest.raises(IndexError):
        tables.copy([StateCopy(1, -9)])
