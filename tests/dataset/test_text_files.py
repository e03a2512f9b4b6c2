"""Rows as lines of text: which files, which columns, and which characters."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, List, Value

from hf_async_batching.dataset import text_files
from hf_async_batching.dataset.text_files import binary_columns, first_bad_line, text_kind, write_text

ROWS: dict[str, list[Any]] = {
    "text": ["plain", "a,b", 'say "x"', "two\nlines", "back\rward", None, "ta\tb"],
    "number": [0.1, 1e300, -0.0, None, 3.0, 2.5, 1 / 3],
    "ids": [[1, 2], [], None, [3], [4], [5], [6]],
    "day": [datetime.date(2024, 1, day) for day in range(1, 8)],
    "yes": [True, False, None, True, True, False, True],
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", ".jsonl"),
        ("A.JSONL.GZ", ".jsonl"),
        ("a.ndjson", ".ndjson"),
        ("a.csv", ".csv"),
        ("a.csv.gz", ".csv"),
        ("a.tsv", ".tsv"),
        ("a.json", ".json"),
        ("a.gz", None),
        ("a.parquet", None),
        ("csv", None),
    ],
)
def test_kinds(name: str, kind: str | None) -> None:
    assert text_kind(Path("folder.csv", name)) == kind


def test_columns_that_hold_bytes() -> None:
    features = Features(
        {
            "text": Value("string"),
            "bytes": Value("binary"),
            "large": List(Value("large_binary")),
            "picture": Image(),
            "numbers": List(List(Value("int32"))),
            "inside": {"a": Value("string"), "b": List({"c": Value("binary")})},
            "outside": {"a": Value("string"), "b": List({"c": Value("bool")})},
        }
    )
    assert binary_columns(features) == ["bytes", "large", "picture", "inside"]
    assert binary_columns({"old": [{"a": Value("binary")}], "fine": [{"a": Value("string")}]}) == ["old"]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv"])
def test_every_value_is_written_whole(
    tmp_path: Path, kind: str, compressed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_BATCH_ROWS", 3)
    dataset = Dataset.from_dict(ROWS).with_format("numpy")
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        write_text(dataset, path, kind, compressed=compressed)
    content = paths[0].read_bytes()
    assert content == paths[1].read_bytes(), "the same rows give the same bytes"
    text = (gzip.decompress(content) if compressed else content).decode()
    rows = [dict(zip(ROWS, values)) for values in zip(*ROWS.values())]
    if kind == ".jsonl":
        assert [json.loads(line) for line in text.split("\n")[:-1]] == [
            {**row, "day": str(row["day"])} for row in rows
        ]
        return
    read = list(csv.reader(io.StringIO(text, newline=""), delimiter="," if kind == ".csv" else "\t"))
    assert read[0] == list(ROWS)
    cells = [["" if value is None else str(value) for value in row.values()] for row in rows]
    assert read[1:] == cells
    assert text.startswith("text,number" if kind == ".csv" else "text\tnumber")
    assert ('"a,b"' in text) == (kind == ".csv") and ('"ta\tb"' in text) == (kind == ".tsv")
    assert '"plain"' not in text and '"back\rward"' in text


def test_a_row_with_one_empty_cell_is_a_line(tmp_path: Path) -> None:
    write_text(Dataset.from_dict({"text": ["a", None]}), tmp_path / "a.csv", ".csv", compressed=False)
    assert (tmp_path / "a.csv").read_bytes() == b'text\na\n""\n'


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("content", "bad"),
    [
        (b"", (0, "the file is empty")),
        (b"\n \n", (0, "the file is empty")),
        (b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}', None),
        (b'{"a": 1}\n\xef\xbb\xbf{"a": 2}', 2),
        (b'\n{"a": 1}\n{"a": ', 3),
        (b'{"a": 1}\n[1, 2]\n', (2, "a row is an object, not [1, 2]")),
        (b'"' + b"x" * 60 + b'"', (1, 'a row is an object, not "' + "x" * 39)),
    ],
    ids=str,
)
def test_the_first_bad_line(tmp_path: Path, content: bytes, bad: Any, packed: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    found = first_bad_line(path)
    assert (found and found[0] if isinstance(bad, int) else found) == bad
