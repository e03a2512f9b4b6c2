"""Rows as lines of text: JSON Lines, CSV and TSV, compressed or not. No value is cut or rounded.

A cell of CSV is the value's text; lists and dictionaries are JSON, and None is an empty cell.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

_BATCH_ROWS = 1000
_DELIMITERS = {".csv": ",", ".tsv": "\t"}

KINDS = (".jsonl", ".ndjson", ".json", *_DELIMITERS)
"""Endings of file names; `.gz` may follow each."""


def text_kind(path: Path) -> str | None:
    """Return the ending that names a file's kind of text, without `.gz`; None for any other file."""
    name = path.name.lower().removesuffix(".gz")
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def binary_columns(features: Mapping[str, Any]) -> list[str]:
    """Return the columns with bytes, images or sounds, which text files cannot hold."""
    return [name for name, feature in features.items() if _holds_bytes(feature)]


def _holds_bytes(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(map(_holds_bytes, feature.values()))
    if isinstance(feature, (list, tuple)):
        return any(map(_holds_bytes, feature))
    if hasattr(feature, "feature"):  # a list
        return _holds_bytes(feature.feature)
    kind = str(getattr(feature, "dtype", ""))
    return "binary" in kind or type(feature).__name__ in ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh")


def write_text(dataset: Any, path: Path, kind: str, *, compressed: bool) -> None:
    """Write all rows of a `Dataset`.

    Args:
        dataset: The dataset; its rows are written as `dataset[i]` shows them without a format.
        path: The file.
        kind: One of `KINDS`.
        compressed: Whether to compress with gzip.

    Raises:
        OSError: The file cannot be written.
    """
    with _open(path, compressed) as file:
        if kind not in _DELIMITERS:
            for row in _rows(dataset):
                file.write(_as_json(row) + "\n")
            return
        delimiter = _DELIMITERS[kind]
        file.write(_line(dataset.column_names, delimiter))
        for row in _rows(dataset):
            file.write(_line(map(_cell, row.values()), delimiter))


def _rows(dataset: Any) -> Iterator[dict[str, Any]]:
    plain = dataset.with_format(None)
    for start in range(0, len(plain), _BATCH_ROWS):
        batch = plain[start : start + _BATCH_ROWS]
        for values in zip(*batch.values()):
            yield dict(zip(batch, values))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(value)
    return _as_json(value) if isinstance(value, (list, dict)) else str(value)


def _line(cells: Iterable[str], delimiter: str) -> str:
    # The module csv does not quote a carriage return, and a reader would end the row there.
    special = {delimiter, '"', "\n", "\r"}
    quoted = ['"' + cell.replace('"', '""') + '"' if special & set(cell) else cell for cell in cells]
    return (delimiter.join(quoted) or '""') + "\n"


def _as_json(value: Any) -> str:
    # Values such as dates and decimals are written as text.
    return json.dumps(value, ensure_ascii=False, default=str)


@contextmanager
def _open(path: Path, compressed: bool) -> Iterator[TextIO]:
    if not compressed:
        with path.open("w", encoding="utf-8", newline="") as file:
            yield file
        return
    # The header has no time and no name, so that the same rows give the same bytes.
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as file,
    ):
        yield file


def first_bad_line(path: Path) -> tuple[int, str] | None:
    """Return the number of the first line that is not JSON, and its error; number 0 if the file has no line."""
    with gzip.open(path, "rb") if _is_gzip(path) else path.open("rb") as file:
        return _first_bad_line(file)


def _first_bad_line(lines: Iterable[bytes]) -> tuple[int, str] | None:
    found = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = True
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:  # bad JSON or bad encoding
            return number, str(error)
        if not isinstance(row, dict):
            return number, f"a row is an object, not {_as_json(row)[:40]}"
    return None if found else (0, "the file is empty")


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"
