"""Runs that write no files and return finished rows in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hf_async_batching.dataset.build import make_progress, make_run, where, without_unused
from hf_async_batching.dataset.rows.formats import with_format_of
from hf_async_batching.dataset.rows.row import RowBlock, RowResult
from hf_async_batching.dataset.rows.source import DatasetSource, PlainSource, Source, StreamSource
from hf_async_batching.dataset.run.consumer import Consumer, in_order
from hf_async_batching.dataset.settings import DatasetSettings

logger = logging.getLogger(__name__)

_TABLE_ROWS = 1024


def completed_rows(settings: DatasetSettings, source: PlainSource, split: str) -> Iterator[dict[str, Any]]:
    """Yield plain rows with the new entries."""
    waiting: dict[int, Mapping[str, Any]] = {}

    def wanted(chunk: RowBlock) -> range:
        for row in chunk.rows if chunk.start == 0 else ():
            settings.columns.check(list(row))
        waiting.update(enumerate(chunk.rows, chunk.start))
        return range(chunk.start, chunk.start + len(chunk.rows))

    for result in _results(settings, source, split, wanted):
        yield {**waiting.pop(result.index), **without_unused(settings, settings.columns.row(result))}


def _results(
    settings: DatasetSettings, source: Source, split: str, wanted: Callable[[RowBlock], range]
) -> Iterator[RowResult]:
    """Yield finished rows in order."""
    run = make_run(settings, source.chunks(), split, wanted)
    progress = make_progress(settings, source.num_rows, split)
    with Consumer(run, progress, settings.on_error, where(split)) as finished:
        try:
            yield from in_order(finished, run.release)
        except KeyboardInterrupt:
            logger.warning(
                "interrupted: completions that were not taken are lost; with resume_dir='a/folder' they are kept, and "
                "a later run continues from them"
            )
            raise


def _whole_chunk(chunk: RowBlock) -> range:
    return range(chunk.start, chunk.start + chunk.table.num_rows)


def completed_dataset(settings: DatasetSettings, dataset: Any, source: DatasetSource, split: str) -> Any:
    """Return the dataset as it is stored, with the new columns in memory."""
    import pyarrow as pa
    from datasets import Dataset, Features, concatenate_datasets

    added = Features(without_unused(settings, settings.columns.features()))
    tables = []
    pending: list[RowResult] = []

    def flush() -> None:
        arrays = without_unused(settings, settings.columns.arrays(pending))
        tables.append(pa.table([arrays[name] for name in added], schema=added.arrow_schema))
        pending.clear()

    for result in _results(settings, source, split, _whole_chunk):
        pending.append(result)
        if len(pending) == _TABLE_ROWS:
            flush()
    flush()
    if not len(dataset):  # `concatenate_datasets` loses the features of an empty one
        empty = Dataset(Features({**dataset.features, **added}).arrow_schema.empty_table())
        return with_format_of(dataset, empty, list(added))
    stored = dataset.with_format(None)
    done = concatenate_datasets([stored, Dataset(pa.concat_tables(tables))], axis=1)
    return with_format_of(dataset, done, list(added))


def completed_stream(settings: DatasetSettings, dataset: Any, source: StreamSource, split: str) -> Any:
    """Return a stream whose rows are completed while it is read."""
    from datasets import DatasetInfo, Features, IterableDataset
    from datasets.iterable_dataset import ExamplesIterable

    new = without_unused(settings, settings.columns.features())
    features = Features({**source.features, **new})

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        tables: dict[int, Any] = {}

        def wanted(chunk: RowBlock) -> range:
            indices = _whole_chunk(chunk)
            for index, row in zip(indices, chunk.table.to_pylist()):
                tables[index] = row
            return indices

        for result in _results(settings, source, split, wanted):
            added = without_unused(settings, settings.columns.row(result))
            yield result.index, {**tables.pop(result.index), **added}

    done = IterableDataset(ExamplesIterable(rows, {}), info=DatasetInfo(features=features))
    return with_format_of(dataset, done, list(new))
