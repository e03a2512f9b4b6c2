"""Runs that write to a folder, and continue from its contents."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_async_batching.dataset.build import make_progress, make_run, where
from hf_async_batching.dataset.rows.formats import with_format_of
from hf_async_batching.dataset.rows.row import RowBlock
from hf_async_batching.dataset.rows.source import DatasetSource, StreamSource
from hf_async_batching.dataset.run.consumer import Consumer
from hf_async_batching.dataset.settings import DatasetSettings
from hf_async_batching.dataset.store.manifest import Manifest, read_manifest
from hf_async_batching.dataset.store.resume_store import ResumeStore
from hf_async_batching.dataset.store.shard_files import ShardFile, load_files
from hf_async_batching.errors import HfAsyncBatchingError, ResumeMismatchError

logger = logging.getLogger(__name__)


def through_folder(
    settings: DatasetSettings, dataset: Any, source: DatasetSource | StreamSource, split: str, kind: str
) -> Any:
    """Complete the rows that are missing in `resume_dir`, and load all rows.

    Args:
        settings: The call's settings, with a `resume_dir`.
        dataset: The caller's dataset.
        source: The rows.
        split: Name of a split of a dictionary of datasets, and of its folder in `resume_dir`.
        kind: "Dataset" or "IterableDataset", the class of the result.
    """
    from datasets import Features

    assert settings.resume_dir is not None
    folder = settings.folder(split)
    features = Features({**source.features, **settings.columns.features()})
    store = ResumeStore(
        folder,
        settings.fingerprint(split, source.num_rows, getattr(source, "transform", None)),
        features,
        settings.columns,
        num_rows=source.num_rows,
        shard_rows=settings.shard_rows,
        ranks=settings.ranks,
    )
    if store.resumed and settings.ranks.rank == 0:
        _say_what_is_kept(store, source.num_rows)
    progress = make_progress(settings, source.num_rows, split)

    def chunks() -> Iterator[RowBlock]:
        end = 0
        for chunk in source.chunks():
            yield chunk
            end = chunk.start + chunk.table.num_rows
        store.read_all(end)

    def wanted(chunk: RowBlock) -> list[int]:
        indices = store.read(chunk)
        progress.resumed(chunk.table.num_rows - len(indices))
        return indices

    run = make_run(settings, chunks(), split, wanted)
    consumer = Consumer(run, progress, settings.on_error, where(split))
    try:
        with consumer as finished:
            for result in finished:
                store.add(result)
                run.release(result.index)
        files = store.finish()
    except BaseException as error:
        kept = store.abort(consumer.left)
        if isinstance(error, ResumeMismatchError):
            raise
        total = f" of {source.num_rows}" if source.num_rows is not None else ""
        logger.warning(
            "%s: %d%s rows%s are kept in %s; call again with the same arguments and resume_dir=%r to continue",
            "interrupted" if isinstance(error, KeyboardInterrupt) else f"ended by {type(error).__name__}",
            kept,
            total,
            where(split),
            folder,
            str(settings.resume_dir),
        )
        raise
    return _loaded(settings, dataset, files, features, kind)


def _say_what_is_kept(store: ResumeStore, num_rows: int | None) -> None:
    kept = store.rows_found()
    left = "" if num_rows is None else f", {num_rows - kept:,} left"
    # Nothing is wrong; but without any setting of logging, a line below this level would not be seen.
    logger.warning("kept %s finished rows of %s%s", f"{kept:,}", store.folder, left)


def load_folder(
    settings: DatasetSettings, dataset: Any, source: DatasetSource | StreamSource, split: str, kind: str
) -> Any:
    """Load a run that another process has finished; the arguments are those of `through_folder`.

    Raises:
        HfAsyncBatchingError: The run is not finished.
    """
    from datasets import Features

    files = _finished_files(settings.folder(split))[1]
    return _loaded(settings, dataset, files, Features({**source.features, **settings.columns.features()}), kind)


def load_finished(folder: Path) -> Any:
    """Load a finished run as a `Dataset` with all columns.

    Raises:
        HfAsyncBatchingError: The run is not finished.
    """
    from datasets import Dataset, Features

    manifest, files = _finished_files(folder)
    features = Features.from_dict(manifest.features)
    return load_files(files, features, streaming=False) if files else Dataset(features.arrow_schema.empty_table())


def _finished_files(folder: Path) -> tuple[Manifest, list[ShardFile]]:
    manifest = read_manifest(folder)
    if manifest is None or manifest.shards is None:
        raise HfAsyncBatchingError(f"the run in {folder} is not finished; start again with the same arguments")
    checksums = manifest.checksums or {}
    files = [ShardFile(folder / "data" / name, checksums.get(name, name)) for name in manifest.shards]
    return manifest, files


def _loaded(settings: DatasetSettings, dataset: Any, files: list[ShardFile], features: Any, kind: str) -> Any:
    from datasets import Dataset

    loaded: Any
    if not files:
        loaded = Dataset(features.arrow_schema.empty_table())
        loaded = loaded if kind == "Dataset" else loaded.to_iterable_dataset()
    else:
        with _quiet():
            loaded = load_files(files, features, streaming=kind != "Dataset")
    unused = settings.columns.names.get("error") if settings.on_error == "raise" else None
    loaded = loaded if unused is None else loaded.remove_columns(unused)
    added = [name for name in settings.columns.names.values() if name != unused]
    return with_format_of(dataset, loaded, added)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the bar of `datasets` if standard error is not a terminal."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or sys.stderr.isatty():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
