"""Results of several devices, dtypes and releases in one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_async_batching.coverage.results import CoverageRun, merged, read_json, replace_text, to_json
from hf_async_batching.coverage.verdicts import Finding, Verdict

EXACT = Verdict(
    "exact", "", "packed", 20, Finding("exact", "", 72, 0, 1e-6), "the same", ("window",), 72, 0, 1e-6, 2e-3
)
WRONG = Verdict("wrong", "prompt 0", "packed", 20, Finding("crashed", "SIGSEGV"), "fails")
CPU = CoverageRun("cpu", "float32", "5.24.0", "2.13.0", "", {"A": EXACT, "B": WRONG})
GPU = CoverageRun("cuda", "bfloat16", "5.17.0", "2.11.0", "H200", {"A": WRONG})


def test_a_run_changes_its_own_column_only() -> None:
    runs = merged([CPU, GPU], CoverageRun("cuda", "bfloat16", "5.17.0", "2.12.0", "H100", {"B": EXACT}))
    assert runs[0] == CPU
    assert runs[1] == CoverageRun("cuda", "bfloat16", "5.17.0", "2.12.0", "H100", {"A": WRONG, "B": EXACT})
    assert GPU.classes == {"A": WRONG}
    others = [
        CoverageRun(*key, "", "", {"A": EXACT}) for key in (("cuda", "float32", "5.17.0"), ("cpu", "float32", "5.9.0"))
    ]
    labels = [run.label for run in merged([GPU, CPU], *others)]
    assert labels == ["CPU float32, 5.9.0", "CPU float32, 5.24.0", "GPU float32, 5.17.0", "GPU bfloat16, 5.17.0"]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    assert read_json(path) == []
    replace_text(path, to_json([CPU, GPU]))
    assert read_json(path) == [CPU, GPU]
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]


def test_the_file_of_a_release_that_knew_one_column(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    verdict = {"status": "exact", "reason": "", "route": "packed", "distinct_tokens": 20, "drop_in": None}
    path.write_text(json.dumps({"transformers": "5.24.0", "torch": "2.13.0", "classes": {"A": verdict}}))
    expected = CoverageRun("cpu", "float32", "5.24.0", "2.13.0", "", {"A": Verdict("exact", "", "packed", 20)})
    assert read_json(path) == [expected]


def test_an_end_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "found.json"
    replace_text(path, "old")

    def half(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        replace_text(path, "newer")
    assert path.read_text() == "old"


def test_what_came_to_no_end_is_tried_again() -> None:
    found = {
        "A": EXACT,
        "B": WRONG,
        "C": Verdict("timed out"),
        "D": Verdict("refused"),
        "E": Verdict("wrong", drop_in=Finding("exact")),
    }
    assert list(CoverageRun("cpu", "float32", "5.24.0", classes=found).finished) == ["A", "D", "E"]
