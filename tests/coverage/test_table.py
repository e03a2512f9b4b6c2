"""The table of all families: made by a command, and committed as it was made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from hf_async_batching.cli import main
from hf_async_batching.coverage import table
from hf_async_batching.coverage.check import Finding, Verdict
from hf_async_batching.coverage.families import entry_names
from hf_async_batching.coverage.table import (
    check_families,
    counts,
    drop_in_counts,
    read_json,
    read_known,
    to_json,
    to_markdown,
    write,
)

DOCS = Path(__file__).parents[2] / "docs"
FOUND = {
    "BForCausalLM": Verdict("refused", "it has | no attention"),
    "AForCausalLM": Verdict("exact", "", "packed", 20, Finding("failed", "TypeError: no"), "fails", ("window",)),
    "AForCausalLM+rope": Verdict("exact", "", "packed", 20, Finding("exact"), "the same"),
}


def test_table(tmp_path: Path) -> None:
    text = to_markdown(FOUND)
    assert "2 classes. submit: 1 refused, 1 exact. generate: 1 refused, 1 failed. Exact in both ways: 0." in text
    assert "1 variants. submit: 1 exact. generate: 1 exact." in text
    first = "| AForCausalLM | exact | failed | packed | fails | generate: TypeError: no; not beyond window |"
    assert text.index(first) < text.index("| BForCausalLM | refused | refused |")
    assert "| AForCausalLM+rope | exact | exact | packed | the same |  |" in text
    assert "it has \\| no attention" in text
    (tmp_path / "found.json").write_text(to_json(FOUND))
    assert read_json(tmp_path / "found.json") == FOUND
    assert drop_in_counts(FOUND) == {"refused": 1, "failed": 1, "exact": 1}


def test_a_run_goes_on_where_one_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.md"
    assert read_known(out) == {}
    write(out, {"LlamaForCausalLM": FOUND["AForCausalLM"], "GPT2LMHeadModel": Verdict("failed", "hung")})
    assert main(["coverage", "LlamaForCausalLM", "GPT2LMHeadModel", "--out", str(out), "--resume"]) == 1
    found = read_json(out.with_suffix(".json"))
    assert found["LlamaForCausalLM"] == FOUND["AForCausalLM"]  # as it was; that is why the exit status is 1
    assert found["GPT2LMHeadModel"].exact
    assert "2/2 GPT2LMHeadModel: exact (packed)" in capsys.readouterr().out
    out.with_suffix(".json").write_text(to_json(found).replace(f'"{transformers.__version__}"', '"4.0"'))
    assert read_known(out) == {}


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.md"
    assert main(["coverage", "LlamaForCausalLM", "RwkvForCausalLM", "--out", str(out), "--workers", "1"]) == 0
    assert "2/2 RwkvForCausalLM: exact (single)" in capsys.readouterr().out
    assert counts(read_json(out.with_suffix(".json"))) == {"exact": 2}
    assert "| LlamaForCausalLM | exact | exact | packed | the same |  |" in out.read_text()


def test_a_process_that_dies_or_hangs_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is monkeypatched here is not in the processes: a class that is not there fails in them, and one second is
    # less than any class takes.
    found = dict(check_families(["NoSuchForCausalLM", "LlamaForCausalLM"], workers=2))
    assert found["NoSuchForCausalLM"].status == "not built"
    assert found["LlamaForCausalLM"].status == "exact"
    hung = dict(check_families(["LlamaForCausalLM"], timeout=0.0))
    assert hung["LlamaForCausalLM"] == Verdict("failed", "not done after 0 seconds")
    monkeypatch.setattr(table, "_check", _die)
    died = dict(check_families(["LlamaForCausalLM"]))
    assert died["LlamaForCausalLM"] == Verdict("failed", "the process ended without a word")


def _die(*_: object) -> Iterator[None]:
    os._exit(3)


def test_committed_table_is_of_all_classes() -> None:
    found = read_json(DOCS / "model-coverage.json")
    if f'"transformers": "{transformers.__version__}"' in (DOCS / "model-coverage.json").read_text():
        assert sorted(found) == entry_names()
        assert (DOCS / "model-coverage.md").read_text() == to_markdown(found)
    for statuses in (counts(found), drop_in_counts(found)):
        assert statuses["exact"] >= 170
        assert statuses["wrong"] == statuses["failed"] == 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_class_of_this_release() -> None:
    found = dict(check_families(entry_names(), workers=os.cpu_count() or 1))
    for statuses in (counts(found), drop_in_counts(found)):
        assert statuses["wrong"] == statuses["failed"] == 0, found
        assert statuses["exact"] >= 105
    committed = read_json(DOCS / "model-coverage.json")
    if f'"transformers": "{transformers.__version__}"' in (DOCS / "model-coverage.json").read_text():
        assert {name: (v.status, v.generate.status, v.route) for name, v in found.items()} == {
            name: (v.status, v.generate.status, v.route) for name, v in committed.items()
        }
