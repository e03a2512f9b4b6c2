"""Sources of rows: `datasets` objects, or any iterable of dictionaries. A source is read once, in order, in chunks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from hf_async_batching.dataset.rows.formats import transform_of
from hf_async_batching.dataset.rows.row import RowBlock

CHUNK_ROWS = 64


class Source(Protocol):
    """Rows, and what is known about them before they are read.

    Attributes:
        num_rows: Number of rows; None for streams.
        column_names: Names of the columns; None if only the rows show them.
    """

    num_rows: int | None
    column_names: list[str] | None

    def chunks(self) -> Iterator[RowBlock]:
        """All rows from the first one on."""


class PlainSource:
    """Rows that are dictionaries or prompts: texts, lists of messages, lists of token ids.

    Args:
        rows: A list, a generator, ...
        prompt: The column that gets a prompt without a dictionary.

    Raises:
        ValueError: The first row of a list is neither a dictionary nor a prompt.
    """

    def __init__(self, rows: Iterable[Any], prompt: str = "prompt") -> None:
        self._rows = rows
        self._prompt = prompt
        self.num_rows = len(rows) if isinstance(rows, Sequence) else None
        self.column_names = list(self._row(0, rows[0])) if isinstance(rows, Sequence) and rows else None

    def chunks(self) -> Iterator[RowBlock]:
        """All rows from the first one on.

        Raises:
            ValueError: A row is neither a dictionary nor a prompt.
        """
        numbered = (self._row(index, row) for index, row in enumerate(self._rows))
        for start, batch in _batches(numbered):
            yield RowBlock(start, batch)

    def _row(self, index: int, row: Any) -> Mapping[str, Any]:
        if isinstance(row, Mapping):
            return row
        if isinstance(row, (str, list, tuple)) or hasattr(row, "tolist"):
            return {self._prompt: row}
        raise ValueError(
            f"`dataset`: row {index} is of type {type(row).__name__}; a row is a dictionary, or a prompt: a text, a "
            "list of messages, a list of token ids"
        )


class DatasetSource:
    """A `datasets.Dataset`.

    Args:
        dataset: The dataset. Prompts are made from its rows as `dataset[i]` shows them: decoded, and transformed if
            the dataset has a transform (`set_transform`). Output columns are added to the stored rows.
        columns: Columns from which prompts and parameters are made; None for whole rows in the dataset's format.

    Attributes:
        transform: The dataset's transform, or None.

    Raises:
        Exception: The transform raises at the first row.
    """

    def __init__(self, dataset: Any, columns: Sequence[str] | None) -> None:
        self._dataset = dataset
        self.features = dataset.features
        self.num_rows: int | None = len(dataset)
        self.column_names: list[str] | None = list(dataset.column_names)
        self.transform = transform_of(dataset)
        self._shown = dataset
        if self.transform is not None:
            if len(dataset):
                self.column_names = list(dataset[0:1])
        elif columns is not None:
            # Rows are Python values, even if the dataset's format has tensors.
            present = [name for name in dict.fromkeys(columns) if name in dataset.column_names]
            self._shown = dataset.select_columns(present).with_format(None)
        elif dataset.format["type"] in ("arrow", "pandas", "polars"):
            self._shown = dataset.with_format(None)

    def chunks(self) -> Iterator[RowBlock]:
        """All rows from the first one on.

        Raises:
            Exception: The transform raises at a row; all earlier rows have been yielded.
        """
        stored = self._dataset.with_format("arrow")
        schema = self.features.arrow_schema
        for start in range(0, len(self._dataset), CHUNK_ROWS):
            end = min(start + CHUNK_ROWS, len(self._dataset))
            table = stored[start:end].cast(schema)
            try:
                rows = self._rows(start, end)
            except Exception:
                # The transform failed at one row, so the rows before it are yielded.
                for index in range(start, end):
                    yield RowBlock(index, self._rows(index, index + 1), table.slice(index - start, 1))
                raise
            yield RowBlock(start, rows, table)

    def _rows(self, start: int, end: int) -> list[dict[str, Any]]:
        batch = self._shown[start:end]
        if any(len(values) != end - start for values in batch.values()):
            raise ValueError(f"the dataset's transform changes the number of rows ({start} to {end - 1})")
        return [{name: batch[name][i] for name in batch} for i in range(end - start)]


class StreamSource:
    """A `datasets.IterableDataset`.

    Args:
        dataset: The dataset, which is read from its beginning. Its format is ignored.
        columns: Columns from which prompts and parameters are made; None for whole rows.
        features: Features of the rows; None for those that the dataset knows, or that its first rows show.
    """

    def __init__(self, dataset: Any, columns: Sequence[str] | None, features: Any = None) -> None:
        self._dataset = dataset
        self._columns = None if columns is None else list(dict.fromkeys(columns))
        self._typed = dataset.features is not None
        self.features = features or dataset.features or _features_of_first_rows(dataset)
        self.num_rows: int | None = None
        self.column_names: list[str] | None = list(self.features)

    def chunks(self) -> Iterator[RowBlock]:
        """All rows from the first one on.

        Raises:
            ValueError: A row does not have the features of the first ones.
        """
        return self._typed_chunks() if self._typed else self._inferred_chunks()

    def _typed_chunks(self) -> Iterator[RowBlock]:
        schema = self.features.arrow_schema
        start = 0
        for table in self._dataset.with_format("arrow").iter(batch_size=CHUNK_ROWS):
            table = self._checked(start, lambda table=table: table.select(list(self.features)).cast(schema))
            shown = table if self._columns is None else table.select(self._columns)
            yield RowBlock(start, [self.features.decode_example(row) for row in shown.to_pylist()], table)
            start += table.num_rows

    def _inferred_chunks(self) -> Iterator[RowBlock]:
        """Yield chunks of a stream without features. `datasets` would infer different types for different batches."""
        import pyarrow as pa

        for start, batch in _batches(self._dataset.with_format(None)):

            def convert(batch: list[Mapping[str, Any]] = batch) -> Any:
                unknown = {name for row in batch for name in row} - set(self.features)
                if unknown:
                    raise ValueError(f"the first rows have no {sorted(unknown)}")
                encoded = [self.features.encode_example({n: row.get(n) for n in self.features}) for row in batch]
                return pa.Table.from_pylist(encoded, schema=self.features.arrow_schema)

            table = self._checked(start, convert)
            # The rows are used directly, because Arrow would give each structure the fields of all others.
            yield RowBlock(start, [{n: row.get(n) for n in self.features} for row in batch], table)

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
        raise ValueError("the stream is empty and has no features, so its columns are unknown; pass `features`")
    columns = dict.fromkeys(name for row in rows for name in row)
    try:
        resolved = dataset._resolve_features().features
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # a column of several types
        resolved = {}
    inferred = {}
    for name in columns:
        try:
            table = pa.table({name: [row.get(name) for row in rows]})
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            inferred[name] = _any_json(name)
        else:
            inferred[name] = Features.from_arrow_schema(table.schema)[name]
            # `datasets` recognizes types such as images. A column that is None in the first rows may have values
            # later.
            if not _is_null(resolved.get(name)):
                inferred[name] = resolved[name]
    return Features(inferred)


def _any_json(name: str) -> Any:
    import datasets

    json: Any = getattr(datasets, "Json", None)  # not in datasets 4.0
    if json is None:
        raise ValueError(f"column {name!r} of the stream has values of several types; `datasets` 5 can keep them")
    return json()


def _is_null(feature: Any) -> bool:
    return feature is None or getattr(feature, "dtype", None) == "null"


def _batches(rows: Iterable[Any]) -> Iterator[tuple[int, list[Any]]]:
    """Yield batches as the index of the first row, and rows. Rows before an error are yielded before it is raised."""
    start, batch = 0, []
    try:
        for row in rows:
            batch.append(row)
            if len(batch) == CHUNK_ROWS:
                yield start, batch
                start, batch = start + CHUNK_ROWS, []
    except GeneratorExit:
        raise
    except BaseException:
        if batch:
            yield start, batch
        raise
    if batch:
        yield start, batch
