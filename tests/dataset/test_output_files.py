"""What the command line writes: nothing of a row is cut, rounded or dropped, or it is refused before the work."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset, Features, Image, Json, List, Value, load_dataset

from hf_async_batching.dataset import output_files
from hf_async_batching.dataset.output_files import OutputError, check_columns, check_output, write_output
from hf_async_batching.dataset.rows.output_columns import OutputColumns
from hf_async_batching.dataset.rows.row import Completion, RowResult

LONG = list(range(1100))
FEATURES = Features(
    {
        "completion": Value("string"),
        "completion_ids": List(Value("int32")),
        "logprobs": List(Value("float64")),
        "count": Value("int64"),
        "number": Value("float64"),
        "nested": {"a": List({"b": Value("string")})},
        "mixed": Json(),
    }
)
ROWS: list[dict[str, Any]] = [
    {
        "completion": 'x,\t"y"\r\nz\rü',
        "completion_ids": LONG,
        "logprobs": [1e-13, -0.1234567890123456],
        "count": 2**60 + 1,
        "number": 1e-17,
        "nested": {"a": [{"b": "1"}, {"b": None}]},
        "mixed": {"1": [None, "a\u00fc"]},
    },
    {
        "completion": None,
        "completion_ids": None,
        "logprobs": [],
        "count": None,
        "number": None,
        "nested": {"a": None},
        "mixed": "text",
    },
]


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_list([{**row, "mixed": json.dumps(row["mixed"])} for row in ROWS], features=FEATURES)


def write(dataset: Any, output: Path) -> bytes:
    assert write_output(dataset, output.parent, output, drop_errors=True).num_rows == len(dataset)
    content = output.read_bytes()
    return gzip.decompress(content) if output.suffix == ".gz" else content


@pytest.mark.parametrize("name", ["out.jsonl", "out.json", "out.ndjson", "out.jsonl.gz", "OUT.JSONL"])
def test_json_lines(rows: Dataset, tmp_path: Path, name: str) -> None:
    content = write(rows.with_format("numpy"), tmp_path / name)
    assert [json.loads(line) for line in content.decode().splitlines()] == ROWS
    if name != "OUT.JSONL":
        loaded = load_dataset("json", data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path))
        assert loaded["completion_ids"][:] == [LONG, None]


@pytest.mark.parametrize(("name", "sign"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ","), ("a.tsv.gz", "\t")])
def test_csv(rows: Dataset, tmp_path: Path, name: str, sign: str) -> None:
    write(rows, tmp_path / name)
    read = gzip.open if name.endswith("gz") else open
    with read(tmp_path / name, "rt", encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file, delimiter=sign))
    texts = ("completion", "count", "number")
    for row, cell in zip(ROWS, cells, strict=True):
        assert [cell[name] for name in texts] == [str(row[name]) if row[name] is not None else "" for name in texts]
        for column in ("completion_ids", "logprobs", "nested"):
            assert (json.loads(cell[column]) if cell[column] else None) == row[column]
    assert json.loads(cells[0]["mixed"]) == ROWS[0]["mixed"]
    assert cells[1]["mixed"] == "text"
    frame = pd.read_csv(tmp_path / name, sep=sign, dtype={"count": "Int64"})
    assert frame["count"][0] == 2**60 + 1
    assert frame["completion"][0] == ROWS[0]["completion"]
    assert json.loads(frame["completion_ids"][0]) == LONG


def test_other_values(tmp_path: Path) -> None:
    day = datetime.date(2026, 1, 2)
    dataset = Dataset.from_dict({"n": [math.nan, math.inf, 0.1], "d": [day, None, day], "b": [True, False, None]})
    lines = [json.loads(line) for line in write(dataset, tmp_path / "out.jsonl").decode().splitlines()]
    assert math.isnan(lines[0]["n"])
    assert lines[1:] == [{"n": math.inf, "d": None, "b": False}, {"n": 0.1, "d": "2026-01-02", "b": None}]
    assert write(dataset, tmp_path / "out.csv").decode().splitlines() == [
        "n,d,b", "nan,2026-01-02,True", "inf,,False", "0.1,2026-01-02,"
    ]  # fmt: skip
    assert (
        write(Dataset.from_dict({"a": ["x\ry", "z"], "b": [1, 2]}), tmp_path / "return.csv") == b'a,b\n"x\ry",1\nz,2\n'
    )
    one = Dataset.from_dict({"a": ["x", None, ""]})
    assert write(one, tmp_path / "one.csv") == b'a\nx\n""\n""\n'
    assert len(pd.read_csv(tmp_path / "one.csv")) == 3


def test_compressed_files_depend_on_their_rows_alone(rows: Dataset, tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write(rows, tmp_path / name)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset.from_dict({"n": range(2500)})
    assert write(dataset, tmp_path / "out.csv").decode().split() == ["n", *map(str, range(2500))]


def test_parquet_and_folders(rows: Dataset, tmp_path: Path) -> None:
    write(rows, tmp_path / "out.parquet")
    write_output(rows, tmp_path, tmp_path / "out", drop_errors=True)
    for name in ("out.parquet", "out/train-00000-of-00001.parquet"):
        loaded = load_dataset("parquet", data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path))
        assert loaded.to_list() == rows.to_list()
        assert loaded.features == FEATURES


@pytest.mark.parametrize("ending", ["xlsx", "txt", "gz", "zip", "arrow", "feather", "html", "parquet.gz"])
def test_other_files_are_refused(tmp_path: Path, ending: str) -> None:
    with pytest.raises(OutputError, match=r"no files of this kind.*\.tsv"):
        check_output(tmp_path / f"out.{ending}")


@pytest.mark.parametrize("name", ["out", "out-0.5", "out.v2", "qwen3-0.6b"])
def test_folders_are_not(tmp_path: Path, name: str) -> None:
    check_output(tmp_path / name)
    assert not output_files._is_file(tmp_path / name)


def test_files_that_are_there(tmp_path: Path) -> None:
    for name in ("a.tsv", "a.jsonl.gz", "a.parquet", "plain"):
        (tmp_path / name).write_text("?")
        with pytest.raises(OutputError, match="is there already"):
            check_output(tmp_path / name)


@pytest.mark.parametrize(
    "feature", [Image(), Value("binary"), List(Value("large_binary")), {"a": [Image()]}, {"a": {"b": Value("binary")}}]
)
def test_bytes_have_no_place_in_text(tmp_path: Path, feature: Any) -> None:
    features = {"n": Value("int64"), "picture": feature}
    for name in ("out.csv", "out.jsonl.gz"):
        with pytest.raises(OutputError, match="column 'picture'"):
            check_columns(tmp_path / name, features)
    check_columns(tmp_path / "out.parquet", features)
    check_columns(tmp_path / "out", features)
    check_columns(tmp_path / "out.csv", FEATURES)
    check_columns(tmp_path / "out.csv", None)


def test_texts_that_arrow_does_not_store() -> None:
    columns = OutputColumns(several=False, text=True, logprobs=False)
    results = [RowResult(0, 1, [Completion([1], "eos", None, "a\ud800")]), RowResult(1, None, [], "b\udc00")]
    arrays = columns.arrays(results)
    assert arrays["completion"].to_pylist() == ["a\\ud800", None]
    assert arrays["error"].to_pylist() == [None, "b\\udc00"]
    assert columns.row(results[0])["completion"] == "a\\ud800"
