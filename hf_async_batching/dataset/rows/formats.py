"""The formats of `datasets`: how a dataset shows its rows, and how its result, with more columns, shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Transform = Callable[[dict[str, Any]], dict[str, Any]]


class WithColumns:
    """A dataset's transform for rows with more columns.

    Args:
        transform: Turns a batch, which is a dictionary of lists, into another one.
        columns: Names of columns that stay as they are.
    """

    def __init__(self, transform: Transform, columns: Sequence[str]) -> None:
        self.transform = transform
        self.columns = list(columns)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Transform a batch."""
        known = {name: values for name, values in batch.items() if name not in self.columns}
        kept = {name: batch[name] for name in self.columns if name in batch}
        return {**(self.transform(known) if known else {}), **kept}


def transform_of(dataset: Any) -> Transform | None:
    """Return the function passed to `Dataset.set_transform`, or None."""
    if dataset.format["type"] != "custom":
        return None
    transform: Transform = dataset.format["format_kwargs"]["transform"]
    return transform


def with_format_of(dataset: Any, result: Any, added: Sequence[str]) -> Any:
    """Give a `Dataset` or `IterableDataset` the format of another one, as `map` does.

    Args:
        dataset: The dataset that has the format.
        result: The rows of `dataset` with more columns.
        added: Names of the new columns.
    """
    if not hasattr(dataset, "format"):
        formatting = getattr(dataset, "_formatting", None)
        return result if formatting is None else result.with_format(formatting.format_type)
    form = dataset.format
    arguments = dict(form["format_kwargs"])
    if form["type"] == "custom":
        arguments["transform"] = WithColumns(arguments["transform"], added)
    if form["type"] is None and set(form["columns"]) == set(dataset.column_names):
        return result
    columns = [*form["columns"], *added]
    return result.with_format(
        form["type"], columns=columns, output_all_columns=form["output_all_columns"], **arguments
    )
