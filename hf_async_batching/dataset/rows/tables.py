"""Recognizes tables of other libraries by the names of their classes, so that no library need be installed."""

from __future__ import annotations

from typing import Any

_REMEDIES = {
    ("polars", "DataFrame"): "datasets.Dataset.from_polars(frame), or frame.to_dicts()",
    ("polars", "LazyFrame"): "datasets.Dataset.from_polars(frame.collect())",
    ("pyarrow", "Table"): "datasets.Dataset(table), or table.to_pylist()",
    ("pyarrow", "RecordBatch"): "batch.to_pylist()",
}


def _kind(cls: type) -> tuple[str, str]:
    return cls.__module__.partition(".")[0], cls.__name__


def is_data_frame(table: Any) -> bool:
    """Whether this is a pandas DataFrame."""
    return ("pandas", "DataFrame") in {_kind(base) for base in type(table).__mro__}


def rows_of_data_frame(frame: Any) -> list[dict[str, Any]]:
    """Return the rows of a pandas DataFrame; missing values are None.

    Raises:
        ValueError: Two columns have the same name.
    """
    names = [str(name) for name in frame.columns]
    if len(set(names)) != len(names):
        raise ValueError(f"`dataset`: two columns of the DataFrame have the same name: {names}; rename one")
    present = frame.astype(object).where(frame.notna(), None)
    return [dict(zip(names, row)) for row in present.itertuples(index=False, name=None)]


def check_no_table(table: Any) -> None:
    """Refuse a table that iterates over columns, or over values without their column.

    Raises:
        ValueError: The dataset is such a table; the message names the remedy.
    """
    library, name = _kind(type(table))
    remedy = _REMEDIES.get((library, name))
    if remedy is not None:
        raise ValueError(f"`dataset` is a {library} {name}; pass {remedy}")
