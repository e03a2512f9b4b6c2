"""Where rows come from: `datasets` objects, or any iterable of dictionaries; read once, in order, in chunks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from hf_async_batching.dataset.row import Chunk

CHUNK_ROWS = 64


class Source(Protocol):
    """Rows, and what is known of them before they are read.

    Attributes:
        num_rows: None for streams.
        column_names: None where only the rows themselves would tell.
    """

    num_rows: int | None
    column_names: list[str] | None

    def chunks(self) -> Iterator[Chunk]:
        """All rows from the first one on."""


class PlainSource:
    """Rows that are dictionaries.

    Args:
        rows: A list, a generator, ...
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows = rows
        self.num_rows = len(rows) if isinstance(rows, Sequence) else None
        self.column_names = list(rows[0]) if isinstance(rows, Sequence) and rows else None

    def chunks(self) -> Iterator[Chunk]:
        """All rows from the first one on."""
        start = 0
        for batch in _batches(self._rows):
            yield Chunk(start, batch)
            start += len(batch)


class DatasetSource:
    """A `datasets.Dataset`.

    Args:
        dataset: Read as it is stored: its format and transforms are for the prompt function only.
        columns: What prompts and parameters are made of; None for whole rows, as the dataset's format gives them.
    """

    def __init__(self, dataset: Any, columns: Sequence[str] | None) -> None:
        self._dataset = dataset
        self._columns = None if columns is None else list(dict.fromkeys(columns))
        self.features = dataset.features
        self.num_rows: int | None = len(dataset)
        self.column_names: list[str] | None = list(dataset.column_names)

    def chunks(self) -> Iterator[Chunk]:
        """All rows from the first one on."""
        stored = self._dataset.with_format("arrow")
        schema = self.features.arrow_schema
        for start in range(0, len(self._dataset), CHUNK_ROWS):
            end = min(start + CHUNK_ROWS, len(self._dataset))
            table = stored[start:end].cast(schema)
            if self._columns is None:
                batch = self._dataset[start:end]
                rows = [{name: batch[name][i] for name in batch} for i in range(end - start)]
            else:
                rows = table.select(self._columns).to_pylist()
            yield Chunk(start, rows, table)


class StreamSource:
    """A `datasets.IterableDataset`.

    Args:
        dataset: Read from its beginning; its format does not matter.
        columns: What prompts and parameters are made of; None for whole rows.
        features: Of the rows; those that the dataset knows, or that its first rows show, where None.
    """

    def __init__(self, dataset: Any, columns: Sequence[str] | None, features: Any = None) -> None:
        self._dataset = dataset
        self._columns = None if columns is None else list(dict.fromkeys(columns))
        self._typed = dataset.features is not None
        self.features = features or dataset.features or _features_of_first_rows(dataset)
        self.num_rows: int | None = None
        self.column_names: list[str] | None = list(self.features)

    def chunks(self) -> Iterator[Chunk]:
        """All rows from the first one on.

        Raises:
            ValueError: A row does not have the features of the first ones.
        """
        start = 0
        for table in self._tables():
            if self._columns is None:
                rows = [self.features.decode_example(row) for row in table.to_pylist()]
            else:
                rows = table.select(self._columns).to_pylist()
            yield Chunk(start, rows, table)
            start += table.num_rows

    def _tables(self) -> Iterator[Any]:
        import pyarrow as pa

        schema = self.features.arrow_schema
        if self._typed:
            start = 0
            for table in self._dataset.with_format("arrow").iter(batch_size=CHUNK_ROWS):
                yield self._checked(start, lambda table=table: table.select(list(self.features)).cast(schema))
                start += table.num_rows
            return
        # Without features `datasets` infers each batch's types anew, and they may differ.
        start = 0
        for batch in _batches(self._dataset.with_format(None)):

            def convert(batch: list[Mapping[str, Any]] = batch) -> Any:
                unknown = {name for row in batch for name in row} - set(self.features)
                if unknown:
                    raise ValueError(f"the first rows have no {sorted(unknown)}")
                encoded = [self.features.encode_example({n: row.get(n) for n in self.features}) for row in batch]
                return pa.Table.from_pylist(encoded, schema=schema)

            yield self._checked(start, convert)
            start += len(batch)

    def _checked(self, start: int, convert: Any) -> Any:
        try:
            return convert()
        except Exception as error:  # pyarrow and datasets raise many kinds
            raise ValueError(
                f"rows from {start} on do not fit the features of the stream's first rows ({error}); give the stream "
                "its features: dataset.cast(Features(...))"
            ) from error


def _features_of_first_rows(dataset: Any) -> Any:
    import pyarrow as pa
    from datasets import Features

    rows = list(itertools.islice(dataset.with_format(None), CHUNK_ROWS))
    if not rows:
        raise ValueError("the stream is empty, and has no features; nothing is known of its columns")
    columns = dict.fromkeys(name for row in rows for name in row)
    resolved = dataset._resolve_features().features
    try:
        inferred = Features.from_arrow_schema(pa.table({n: [row.get(n) for row in rows] for n in columns}).schema)
    except pa.ArrowInvalid:
        inferred = resolved
    # `datasets` knows images and the like; a column of None in the few rows that it looks at may have values later.
    return Features({n: inferred[n] if _is_null(resolved.get(n)) else resolved[n] for n in inferred})


def _is_null(feature: Any) -> bool:
    return feature is None or getattr(feature, "dtype", None) == "null"


def _batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, CHUNK_ROWS)):
        yield batch
