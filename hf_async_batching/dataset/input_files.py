"""Reads INPUT of the command line: files, folders, and names on the Hub."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_async_batching.dataset.text_files import first_bad_line

# From a file's ending to a builder of `datasets` and its arguments. `.gz` may follow each ending but Parquet's.
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".txt": ("text", {}),
    ".parquet": ("parquet", {}),
}
_MOST_CHARACTERS = 1000


class InputError(Exception):
    """A mistake that the user can correct; the message says how."""


def read_input(name: str, *, config: str | None, split: str | None, limit: int | None, streaming: bool) -> Any:
    """Read a `Dataset`, or an `IterableDataset` if `streaming`.

    Args:
        name: A file or a pattern of files, a folder, or a name on the Hub.
        config: Configuration of a dataset that has several.
        split: Name of the split; None for "train", or for the only split.
        limit: Number of rows to read from the start; None for all.
        streaming: Whether rows are read while earlier rows are served.

    Raises:
        InputError: The dataset or split does not exist, or it cannot be read.
    """
    try:
        from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset, load_from_disk
    except ImportError as error:
        raise InputError(f"the command needs the package `datasets` ({error}): pip install datasets") from error
    files = find_files(name)
    if not files and not Path(name).exists() and _is_path(name):
        raise InputError(f"INPUT {name}: there is no such file or folder")
    loaded: Any
    try:
        if files:
            loaded = _load_files(files, streaming)
        elif Path(name, "state.json").exists() or Path(name, "dataset_dict.json").exists():
            loaded = load_from_disk(name)
        else:
            loaded = load_dataset(name, config, streaming=streaming)
    except InputError:
        raise
    except Exception as error:  # `datasets` raises many kinds
        raise InputError(input_problem(name) or f"INPUT {name}: {_message(error)}") from error
    if isinstance(loaded, (DatasetDict, IterableDatasetDict)):
        loaded = loaded[_split(name, list(loaded), split)]
    elif split is not None:
        raise InputError(f"--split {split}: {name} has no splits")
    if streaming and isinstance(loaded, Dataset):
        loaded = loaded.to_iterable_dataset()
    if limit is None:
        return loaded
    return loaded.take(limit) if streaming else loaded.select(range(min(limit, len(loaded))))


def find_files(name: str) -> list[str]:
    """Find the files of a name or a pattern. A name that is an existing file is never a pattern."""
    if Path(name).is_file():
        return [name]
    return sorted(path for path in glob.glob(name, recursive=True) if Path(path).is_file())


def _is_path(name: str) -> bool:
    """Whether a name must be a path and cannot be a name on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or _kind(name) in _BUILDERS


def input_problem(name: str) -> str | None:
    """Say in one line which file of an input is damaged, and at which of its lines if that is known.

    None if all files are good, or if the input is not a file.
    """
    return next((f"INPUT {text}" for file in find_files(name) if (text := _problem(Path(file))) is not None), None)


def _message(error: BaseException) -> str:
    """Write an error in one line, from its first cause that has a message."""
    text = ""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).strip() or text
        cause = cause.__cause__
    return " ".join(text.split())[:_MOST_CHARACTERS] or type(error).__name__


def _problem(path: Path) -> str | None:
    """Say what is wrong with one file; None if nothing is found."""
    if not path.stat().st_size:
        return f"{path}: the file is empty"
    builder, _ = _builder([str(path)])
    if builder == "json":
        try:
            bad = first_bad_line(path)
        except (OSError, EOFError) as error:  # a damaged gzip file
            return f"{path}: {error}"
        if bad is None or _is_whole_json(path):
            return None
        number, message = bad
        return f"{path}, line {number}: {message}" if number else f"{path}: {message}"
    try:
        for _ in _load_files([str(path)], True)["train"]:
            pass
    except Exception as error:  # `datasets` raises many kinds
        return f"{path}: {_message(error)}"
    return None


def _is_whole_json(path: Path) -> bool:
    """Whether a file is one JSON value over several lines, such as a list of rows."""
    with path.open("rb") as file:
        return path.suffix.lower() == ".json" and file.read(100).lstrip().startswith(b"[")


def _load_files(files: list[str], streaming: bool) -> Any:
    from datasets import load_dataset
    from datasets.data_files import DataFilesDict, DataFilesList

    builder, arguments = _builder(files)
    paths = [str(Path(path).absolute()) for path in files]
    listed: Any = {"train": paths}
    if any(glob.has_magic(path) for path in paths):
        # `datasets` would read these files' names as patterns.
        if any(path.lower().endswith(".gz") for path in paths):
            raise InputError(f"INPUT: `datasets` cannot read a .gz file with one of * ? [ in its path: {paths[0]}")
        states = [(path, *_state(path)) for path in paths]
        listed = DataFilesDict({"train": DataFilesList(paths, states)})
    return load_dataset(builder, data_files=listed, streaming=streaming, **arguments)


def _state(path: str) -> tuple[str, str]:
    status = Path(path).stat()
    return str(status.st_size), str(status.st_mtime_ns)


def _builder(files: list[str]) -> tuple[str, Mapping[str, Any]]:
    kinds = {_kind(path) for path in files}
    found = [_BUILDERS[kind] for kind in kinds if kind in _BUILDERS]
    if len(found) < len(kinds) or any(builder != found[0] for builder in found):
        raise InputError(
            f"INPUT: files must all be of one kind, {', '.join(_BUILDERS)} (also with .gz); "
            f"got {', '.join(sorted(kinds))}"
        )
    return found[0]


def _kind(path: str) -> str:
    """Return a file's ending, without gzip's."""
    plain = Path(path)
    if plain.suffix.lower() == ".gz" and Path(plain.stem).suffix.lower() != ".parquet":
        plain = Path(plain.stem)
    return plain.suffix.lower()


def _split(name: str, splits: list[str], wanted: str | None) -> str:
    if wanted is None and len(splits) == 1:
        return splits[0]
    chosen = wanted or "train"
    if chosen not in splits:
        raise InputError(f"--split: {name} has no split {chosen!r}; choose one of {', '.join(splits)}")
    return chosen
