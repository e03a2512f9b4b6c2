"""What INPUT of the command line can be."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class InputError(Exception):
    """What a person can put right; the message says how."""


def read_input(name: str, *, config: str | None, split: str | None, limit: int | None, streaming: bool) -> Any:
    """A `Dataset`, or an `IterableDataset` where `streaming`.

    Args:
        name: A file or a pattern of files, a folder, or a name on the Hub.
        config: Of a dataset with several configurations.
        split: "train", or the only one, where None.
        limit: The first rows only.
        streaming: Read while rows are served.

    Raises:
        InputError: There is no such dataset or split, or it cannot be read.
    """
    try:
        from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset, load_from_disk
    except ImportError as error:
        raise InputError(
            f"the command needs the package `datasets` ({error}): pip install 'hf_async_batching[datasets]'"
        ) from error
    files = sorted(path for path in glob.glob(name, recursive=True) if Path(path).is_file())
    loaded: Any
    try:
        if files:
            loaded = load_dataset(_builder(files), data_files=files, streaming=streaming)
        elif Path(name, "state.json").exists() or Path(name, "dataset_dict.json").exists():
            loaded = load_from_disk(name)
        else:
            loaded = load_dataset(name, config, streaming=streaming)
    except InputError:
        raise
    except Exception as error:  # `datasets` raises many kinds
        raise InputError(f"INPUT {name}: {error}") from error
    if isinstance(loaded, (DatasetDict, IterableDatasetDict)):
        loaded = loaded[_split(name, list(loaded), split)]
    elif split is not None:
        raise InputError(f"--split {split}: {name} has no splits")
    if streaming and isinstance(loaded, Dataset):
        loaded = loaded.to_iterable_dataset()
    if limit is None:
        return loaded
    return loaded.take(limit) if streaming else loaded.select(range(min(limit, len(loaded))))


def _builder(files: list[str]) -> str:
    kinds = {Path(path).suffix.lower() for path in files}
    builders = {_BUILDERS.get(kind) for kind in kinds}
    builder = builders.pop()
    if builders or builder is None:
        raise InputError(
            f"INPUT: files must all be of one kind, {', '.join(_BUILDERS)}; got {', '.join(sorted(kinds))}"
        )
    return builder


def _split(name: str, splits: list[str], wanted: str | None) -> str:
    if wanted is None and len(splits) == 1:
        return splits[0]
    chosen = wanted or "train"
    if chosen not in splits:
        raise InputError(f"--split: {name} has no split {chosen!r}; choose one of {', '.join(splits)}")
    return chosen
