"""Tables of other libraries, which are told by their classes' names: the libraries need not be installed."""

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
    """The rows of a pandas DataFrame; missing values are None.

    Raises:
        ValueError: Two columns have one name.
    """
    names = [str(name) for name in frame.columns]
    if len(set(names)) != len(names):
        raise ValueError(f"`dataset`: the DataFrame has two columns of one name: {names}")
    present = frame.astype(object).where(frame.notna(), None)
    return [dict(zip(names, row, strict=True)) for row in present.itertuples(index=False, name=None)]


def check_no_table(table: Any) -> None:
    """Refuse a table whose iteration gives columns, or values without their column.

    Raises:
        ValueError: Names the remedy.
    """
    library, name = _kind(type(table))
    remedy = _REMEDIES.get((library, name))
    if remedy is not None:
        raise ValueError(f"`dataset` is a {library} {name}; pass {remedy}")
