"""Files that decode to far more than they are: refused, in bounded memory and time."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from demo.dataset.table import BOUNDS, MAX_ROWS, TableError, read_table, table_of

SECONDS = 12.0


def parquet(**columns: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        pq.write_table(pa.table({name: make() for name, make in columns.items()}), path, compression="zstd")

    return write


def content(text: str | bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)

    return write


def repeated(text: str, rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), [text])


BOMBS: dict[str, tuple[Callable[[Path], None], str]] = {
    "dictionary.parquet": (parquet(prompt=lambda: repeated("x" * 6_500_000, 2000)), "longer than 256 kB"),
    "many.parquet": (parquet(prompt=lambda: repeated("x" * 200_000, 2000)), "a table may hold 32 MB"),
    "page.parquet": (parquet(prompt=lambda: ["x" * 60_000_000]), "more memory|longer than"),
    "nulls.parquet": (parquet(a=lambda: pa.array([[None] * 5_000_000], pa.list_(pa.int64()))), "longer than 256 kB"),
    "nested.parquet": (parquet(a=lambda: [["y" * 20_000] * 500] * 64), "longer than 256 kB|more memory"),
    "columns.parquet": (parquet(**{f"c{i}": lambda: ["a"] for i in range(99)}), "more than 64 columns"),
    "deep.jsonl": (content('{"a":' + "[" * 100_000 + "]" * 100_000 + "}\n"), "cannot be read"),
    "nested.jsonl": (content('{"a":' + "[" * 500 + "]" * 500 + "}\n"), "cannot be read"),
    "digits.jsonl": (content('{"a":' + "1" * 1_000_000 + "}\n"), "cannot be read"),
    "integer.jsonl": (content('{"a":' + "1" * 100 + "}\n"), "cannot be read"),
    "surrogate.jsonl": (content('{"a":"\\ud800"}\n'), "cannot be read"),
    "line.jsonl": (content('{"a":"' + "x" * 19_000_000 + '"}\n'), "too long"),
    "cell.jsonl": (content('{"a":"' + "x" * 300_000 + '"}\n'), "longer than 256 kB"),
    "keys.jsonl": (content(json.dumps(dict.fromkeys(map(str, range(100_000)), 1)) + "\n"), "more than 64 columns"),
    "line.csv": (content("a\n" + "x" * 19_000_000 + "\n"), "field larger"),
    "header.csv": (content("," * 9_000_000 + "\n"), "more than 64 columns"),
    "quote.csv": (content(b"a\n" + b'"' * 1_000_001), "field larger"),
    "packed.jsonl": (content(gzip.compress(b'{"a":"x"}\n' * 1_000_000)), "cannot be read"),
    "packed.jsonl.gz": (content(gzip.compress(b'{"a":"x"}\n' * 1_000_000)), "is needed"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_decodes_to_too_much_is_refused(tmp_path: Path, name: str) -> None:
    write, words = BOMBS[name]
    write(tmp_path / name)
    began = time.perf_counter()
    with pytest.raises(TableError, match=words):
        read_table(tmp_path / name)
    assert time.perf_counter() - began < SECONDS


def test_the_operating_system_ends_a_reader_that_takes_too_much(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("no limits of a process there")
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "b"}\n')
    reader = Path(__file__).resolve().parents[3] / "demo" / "dataset" / "table_reader.py"
    script = (
        f"import sys; sys.path.insert(0, {str(reader.parent)!r}); import table_reader as r; "
        f"r.limit_process(r.TableBounds(**{BOUNDS._asdict()!r})); bytearray({2 << 30})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "MemoryError" in done.stderr
    bounds = json.dumps(BOUNDS._asdict() | {"memory_bytes": 1 << 20})
    command = [sys.executable, "-I", str(reader), str(path)]
    done = subprocess.run(command, input=bounds, capture_output=True, text=True, timeout=60)
    assert done.returncode


def test_a_reader_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "win32":
        pytest.skip("no pipes with names there")
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    monkeypatch.setattr("demo.dataset.table._WAIT_SECONDS", 1.0)
    with pytest.raises(TableError, match="too long to read"):
        read_table(path)


def test_types_survive_the_reader(tmp_path: Path) -> None:
    columns = {
        "prompt": pa.array(["a", None], pa.large_string()),
        "word": pa.array(["x", "x"]).dictionary_encode(),
        "n": [1, 2],
        "list": [["a", "b"], []],
        "struct": [{"k": "v"}, {"k": None}],
        "bytes": [b"1", b"2"],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    table, more = read_table(tmp_path / "a.parquet")
    assert not more
    assert table.to_dict() == pa.table(columns).to_pydict()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "must be 1 to"),
        ([{"a": 1}] * (MAX_ROWS + 1), "must be 1 to"),
        (["a", "b"], "must be objects"),
        ([{"a": 1}, {"a": {"b": 2}}], "must be objects"),
        ([dict.fromkeys(map(str, range(65)), 1)], "up to 64 keys"),
        ([{"a": 10**30}], "must be objects"),
        ([{"a": "\ud800"}], "must be objects"),
        ([{"a": "x" * 2**20}] * 40, "up to 32 MB"),
    ],
)
def test_rows_of_the_api_are_bounded(rows: Any, words: str) -> None:
    with pytest.raises(TableError, match=words):
        table_of(rows)
