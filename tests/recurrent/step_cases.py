"""Steps with states, for tests: contexts of rows that decode and pieces of prompts, and tables with random states."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_async_batching.attention.base import DecodeContext, MixedContext
from hf_async_batching.kv_cache.state_tables import StateShape, StateTables
from hf_async_batching.recurrent.step import RecurrentStep

NO_PAGES = torch.zeros(1, 1, dtype=torch.int32)


class Case(NamedTuple):
    """Rows that decode (row, position), and pieces of prompts (row, tokens, position); None where there are none."""

    decodes: list[tuple[int, int]]
    pieces: list[tuple[int, int, int]] | None = None
    padding: int = 0


CASES = {
    "one row": Case([(1, 5)]),
    "rows, a row that begins, and the padding row": Case([(3, 9), (1, 0), (2, 2), (0, 0), (0, 0)]),
    "a prompt": Case([], [(2, 9, 0)]),
    "a piece that continues": Case([], [(4, 5, 1), (1, 1, 2)]),
    "pieces beside decoding rows": Case([(5, 7), (0, 0), (3, 1)], [(1, 6, 0), (2, 2, 6), (4, 1, 0)]),
    "padded": Case([(5, 7), (0, 0)], [(1, 6, 0), (2, 3, 4)], 5),
}


def context_of(case: Case, tile_size: int = 4) -> DecodeContext | MixedContext:
    """The context of a step, with pieces cut into tiles."""

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    rows = [row for row, _ in case.decodes]
    positions = [position for _, position in case.decodes]
    if case.pieces is None:
        return DecodeContext(NO_PAGES, ints(rows), ints(positions), ints(positions) + 1)
    tiles = [(row, i, 1, position) for i, (row, position) in enumerate(case.decodes)]
    lengths = ints(positions) + 1
    for row, count, position in case.pieces:
        for begin in range(0, count, tile_size):
            tiles.append((row, len(rows) + begin, min(tile_size, count - begin), position + begin))
        rows += [row] * count
        positions += range(position, position + count)
    rows += [0] * case.padding
    positions += [0] * case.padding
    tiles += [(0, 0, 0, 0)] * min(case.padding, 2)
    columns = [ints([tile[i] for tile in tiles]) for i in range(4)]
    return MixedContext(NO_PAGES, ints(rows), ints(positions), *columns, lengths)


def step_of(context: DecodeContext | MixedContext, states: dict[object, torch.Tensor]) -> RecurrentStep:
    """A step on tables that hold copies of these states, with another state beside them in memory."""
    rows = next(iter(states.values())).shape[0]
    shapes: dict[object, StateShape] = {
        key: StateShape(tuple(one.shape[1:]), one.dtype) for key, one in states.items()
    }
    tables = StateTables(rows, torch.device("cpu"), {"beside": StateShape((3,), torch.float32), **shapes}, 1)
    for key, state in states.items():
        tables.table(key, tuple(state.shape[1:]), state.dtype).copy_(state)
    return RecurrentStep(context, tables, {})


def states_of(step: RecurrentStep) -> dict[object, torch.Tensor]:
    """The states of all rows but the padding row."""
    assert not step.tables.table("beside", (3,), torch.float32).any()
    return {key: step.tables.table(key, *shape)[1:] for key, shape in step.tables.shapes.items() if key != "beside"}
