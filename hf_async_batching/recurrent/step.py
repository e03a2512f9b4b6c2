"""What layers with states need to know of a step: the rows of its tokens, and where their states are.

The engine's thread sets the step around a forward, as it does for attention. A layer names itself by its *tag*. The
tag is a small tensor, and only its address matters. An index would be a constant in compiled code, so each layer would
need code of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hf_async_batching.attention.base import AttentionContext, DecodeContext
from hf_async_batching.kv_cache.state_tables import StateTables

Functions = dict[str, Callable[..., Any]]


class Piece(NamedTuple):
    """Consecutive tokens of one row in a step: the first is at `query` in the step and at `position` in the row."""

    row: int
    query: int
    length: int
    position: int


@dataclass(slots=True)
class RecurrentStep:
    """A step, for layers with states.

    Attributes:
        context: Rows and positions of the tokens.
        tables: The states of all rows.
        mixers: The functions of each layer that ours replace, by name, by the address of the layer's tag.
        frozen: Whether states stay as they are, so that a layer can be computed twice.
    """

    context: AttentionContext
    tables: StateTables
    mixers: dict[int, tuple[int, Functions]]
    frozen: bool = False

    def layer(self, tag: torch.Tensor) -> tuple[int, Functions]:
        """Index of a layer, and its original functions."""
        return self.mixers[tag.data_ptr()]


class _Active(threading.local):
    step: RecurrentStep | None = None
    tag: torch.Tensor | None = None
    frozen: bool = False


_active = _Active()


@contextmanager
def active(step: RecurrentStep) -> Iterator[None]:
    """Offer a step to the layers that this thread runs."""
    _active.step = step
    step.frozen = _active.frozen
    try:
        yield
    finally:
        _active.step = _active.tag = None


@contextmanager
def frozen() -> Iterator[None]:
    """Leave all states as they are in the steps that this thread runs meanwhile."""
    _active.frozen = True
    try:
        yield
    finally:
        _active.frozen = False


def current_step() -> RecurrentStep:
    """The step that this thread runs.

    Raises:
        RuntimeError: The thread runs none.
    """
    if _active.step is None:
        raise RuntimeError("layers with states of a view work only inside the engine of hf_async_batching")
    return _active.step


def enter_layer(tag: torch.Tensor) -> None:
    """Say which layer runs, for functions that its forward gives no keyword arguments to."""
    _active.tag = tag


def current_tag() -> torch.Tensor:
    """The tag of the layer that runs in this thread."""
    assert _active.tag is not None
    return _active.tag


def decoding(context: AttentionContext) -> int:
    """Number of leading tokens that each belong to another row."""
    return context.rows.shape[0] if isinstance(context, DecodeContext) else context.num_decodes


def pieces(context: AttentionContext) -> list[Piece]:
    """The pieces behind the tokens that decode; reads the step's tiles on the host."""
    if isinstance(context, DecodeContext):
        return []
    found = context.step_cache.get("pieces")
    if not isinstance(found, list):
        tiles = (context.tile_rows, context.tile_queries, context.tile_lengths, context.tile_positions)
        read = torch.stack([tensor.int() for tensor in tiles], 1).tolist()[context.num_decodes :]
        found = context.step_cache["pieces"] = _joined([Piece(*tile) for tile in read])
    return found


def _joined(tiles: list[Piece]) -> list[Piece]:
    """Tiles that continue one another, as one piece."""
    made: list[Piece] = []
    for tile in tiles:
        last = made[-1] if made else None
        if not tile.row or not tile.length:
            continue
        if last is not None and last.row == tile.row and last.query + last.length == tile.query:
            made[-1] = last._replace(length=last.length + tile.length)
        else:
            made.append(tile)
    return made
