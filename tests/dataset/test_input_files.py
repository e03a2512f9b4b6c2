"""What the command line reads: every kind of file, and what it says of those that cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_async_batching.dataset.input_files import InputError, find_files, input_problem, read_input
from hf_async_batching.dataset.text_files import first_bad_line

ROWS = [{"prompt": 'a, "b"', "n": 1}, {"prompt": "c\nd", "n": 2}]


def read(path: Path, **arguments: Any) -> list[dict[str, Any]]:
    defaults = {"config": None, "split": None, "limit": None, "streaming": False}
    return list(read_input(str(path), **{**defaults, **arguments}))


def text_of(kind: str) -> str:
    if kind in (".csv", ".tsv"):
        sign = "," if kind == ".csv" else "\t"
        return f'prompt{sign}n\n"a, ""b"""{sign}1\n"c\nd"{sign}2\n'
    return "".join(json.dumps(row) + "\n" for row in ROWS) if kind == ".jsonl" else json.dumps(ROWS)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".json"])
def test_rows(tmp_path: Path, kind: str, packed: bool, streaming: bool) -> None:
    path = tmp_path / f"in{kind}{'.gz' if packed else ''}"
    content = text_of(kind).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    assert read(path, streaming=streaming) == ROWS


def test_text_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a\n\nb\n")
    assert read(tmp_path / "in.txt") == [{"text": "a"}, {"text": ""}, {"text": "b"}]
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "in.parquet"))
    assert read(tmp_path / "in.parquet") == ROWS


@pytest.mark.parametrize("name", ["in[1].jsonl", "in*.jsonl", "x?.jsonl"])
def test_names_that_look_like_patterns(tmp_path: Path, name: str) -> None:
    (tmp_path / "in1.jsonl").write_text('{"prompt": "other"}\n')
    (tmp_path / name).write_text(text_of(".jsonl"))
    for streaming in (False, True):
        assert read(tmp_path / name, streaming=streaming) == ROWS
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(b"{}", mtime=0))
    with pytest.raises(InputError, match=r"cannot read a \.gz file"):
        read(packed)


def test_several_files(tmp_path: Path) -> None:
    for i, name in enumerate(["b.jsonl", "a.jsonl", "c.jsonl.gz"]):
        line = json.dumps({"prompt": str(i)}).encode()
        (tmp_path / name).write_bytes(gzip.compress(line, mtime=0) if name.endswith("gz") else line)
    assert read(tmp_path / "*.jsonl*") == [{"prompt": "1"}, {"prompt": "0"}, {"prompt": "2"}]
    assert find_files(str(tmp_path / "*.csv")) == []
    (tmp_path / "a.tsv").write_text("prompt\nx\n")
    (tmp_path / "a.csv").write_text("prompt\nx\n")
    for pattern in ("a.*", "a.?sv"):
        with pytest.raises(InputError, match="must all be of one kind"):
            read(tmp_path / pattern)


BROKEN = [
    ("a.jsonl", b"", "a.jsonl: the file is empty"),
    ("a.jsonl", b" \n\n", "a.jsonl: the file is empty"),
    ("a.jsonl.gz", gzip.compress(b"", mtime=0), "a.jsonl.gz: the file is empty"),
    ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": oops}\n', "a.jsonl, line 3: Expecting value"),
    ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', "a.jsonl, line 2: Expecting ',' delimiter"),
    ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\nno\n', mtime=0), "a.jsonl.gz, line 2: Expecting value"),
    ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 999, mtime=0)[:40], "a.jsonl.gz: Compressed file ended"),
    ("a.csv", b"", "a.csv: the file is empty"),
    ("a.csv", b"a,b\n1,2\n1,2,3,4\n", "a.csv: .*Expected 2 fields in line 3, saw 4"),
    ("a.tsv", b"a\tb\n1\t2\n1\t2\t3\n", "a.tsv: .*Expected 2 fields in line 3, saw 3"),
    ("a.parquet", b"PAR1....PAR", "a.parquet: "),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_one_line_names_the_file_and_the_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^INPUT .*{message}") as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)
    if name == "a.jsonl" and content.strip():
        (tmp_path / "A.jsonl").write_text('{"prompt": "a"}\n')  # is read before the other
        with pytest.raises(InputError, match=f"^INPUT .*{message}"):
            read(tmp_path / "*.jsonl")


def test_what_is_no_files_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"prompt": "a"}\n\n{"prompt": NaN}\n', encoding="utf-8")
    assert first_bad_line(path) is None
    assert input_problem(str(path)) is None
    assert input_problem(str(tmp_path / "nothing")) is None
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    assert input_problem(str(tmp_path / "a.json")) is None
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    assert "line 2: 'utf-8' codec" in str(input_problem(str(path)))
    path.write_text("[1]\n")
    assert first_bad_line(path) == (1, "a row is an object, not [1]")
    with pytest.raises(InputError, match=r"^INPUT nowhere"):
        read(Path("nowhere"))
