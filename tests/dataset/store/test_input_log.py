"""What was read is compared with what earlier runs have read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Array2D, Features

from hf_async_batching.dataset.rows.row import RowBlock
from hf_async_batching.dataset.store.input_log import InputLog
from hf_async_batching.errors import ResumeMismatchError


def block(start: int, *texts: str, **columns: Any) -> RowBlock:
    table = pa.table({"text": list(texts), **columns})
    return RowBlock(start, table.to_pylist(), table)


def log(folder: Path, *blocks: RowBlock, rank: int = 0, end: int | None = None) -> InputLog:
    made = InputLog(folder, rank)
    for one in blocks:
        made.check(one)
    if end is not None:
        made.end(end)
    made.close()
    return made


def test_what_each_rank_has_read_is_known_to_all(tmp_path: Path) -> None:
    (tmp_path / "inputs-0.log.old").write_text("no log")
    log(tmp_path, block(0, "a", "b"))
    log(tmp_path, block(0, "a", "b"), block(2, "c"), rank=1, end=3)
    again = InputLog(tmp_path, 0)
    assert again.num_rows == 3
    again.check(block(0, "a", "b"))
    with pytest.raises(ResumeMismatchError, match="rows 2 to 2 differ in 'text'"):
        again.check(block(2, "d"))
    again.close()


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (block(0, "a", "c", n=[1, 2]), "the data has changed: rows 0 to 1 differ in 'text'$"),
        (block(0, "a", "c", n=[1, 3]), "rows 0 to 1 differ in 'text', 'n'$"),
        (block(0, "a", "b"), "rows 0 to 1 differ in 'n'$"),
        (block(0, "a", "b", n=[1, 2], m=[0, 0]), "rows 0 to 1 differ in 'm'$"),
        (block(0, "a", "b", n=[1.0, 2.0]), "rows 0 to 1 differ in 'n'$"),
        (block(0, "a", n=[1]), "another number of rows than before: from row 0 on 2 then, 1 now$"),
    ],
    ids=["text", "both", "fewer columns", "more columns", "type", "fewer rows"],
)
def test_other_data_is_refused(tmp_path: Path, now: RowBlock, message: str) -> None:
    log(tmp_path, block(0, "a", "b", n=[1, 2]))
    with pytest.raises(ResumeMismatchError, match=message):
        log(tmp_path, now)


def test_rows_behind_the_end_are_refused(tmp_path: Path) -> None:
    log(tmp_path, block(0, "a", "b"), end=2)
    log(tmp_path, end=2)
    with pytest.raises(ResumeMismatchError, match="another number of rows: 2 before, 3 now"):
        log(tmp_path, end=3)
    with pytest.raises(ResumeMismatchError, match="more rows than before: 2 then"):
        log(tmp_path, block(2, "c"))
    log(tmp_path, block(1, "b"))


def test_equal_values_are_equal_in_any_form(tmp_path: Path) -> None:
    """In pieces, as a part of more, and without a piece; and values of a type of one's own by what they hold."""
    whole = pa.table({"text": ["x", "a", None, "y"]})
    pieces, nothing = pa.chunked_array([["a"], [None]], pa.string()), pa.chunked_array([], pa.string())
    log(tmp_path, RowBlock(0, [], whole.slice(1, 2)), RowBlock(2, [], pa.table({"text": nothing})))
    log(tmp_path, RowBlock(0, [], pa.table({"text": pieces})), RowBlock(2, [], whole.slice(4, 0)))
    square = Features({"square": Array2D((1, 2), "int32")}).arrow_schema.field("square").type
    values = pa.array([[[1, 2]], [[3, 4]]], pa.list_(pa.list_(pa.int32())))
    squares = pa.ExtensionArray.from_storage(square, values)
    (tmp_path / "b").mkdir()
    log(tmp_path / "b", RowBlock(0, [], pa.table({"square": squares})))
    log(tmp_path / "b", RowBlock(0, [], pa.table({"square": pa.chunked_array([squares[:1], squares[1:]])})))
    with pytest.raises(ResumeMismatchError, match="'square'"):
        log(tmp_path / "b", RowBlock(0, [], pa.table({"square": squares.take(pa.array([1, 0]))})))
