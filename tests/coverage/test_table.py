"""The table of all families: made by a command, and committed as it was made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_async_batching.cli.main import main
from hf_async_batching.coverage import families, processes
from hf_async_batching.coverage.families import entry_names
from hf_async_batching.coverage.processes import Checked, check_families
from hf_async_batching.coverage.results import CoverageRun, read_json, to_json
from hf_async_batching.coverage.table import counts, drop_in_counts, read, routes, to_markdown, write
from hf_async_batching.coverage.verdicts import BAD, SERVED, Finding, Verdict

DOCS = Path(__file__).parents[2] / "docs"
FOUND = {
    "BForCausalLM": Verdict("refused", "it has | no attention"),
    "AForCausalLM": Verdict("exact", "", "packed", 20, Finding("failed", "TypeError: no"), "fails", ("window",)),
    "AForCausalLM+rope": Verdict("exact", "", "packed", 20, Finding("exact"), "the same"),
}
ROUNDED = Verdict(
    "within rounding", "2 of 72", "single", 20, Finding("exact", "", 72), "other tokens", (), 72, 2, 0.1, 0.2
)
CPU = CoverageRun("cpu", "float32", "5.24.0", "2.13.0", "", FOUND)
GPU = CoverageRun(
    "cuda", "bfloat16", "5.17.0", "2.11.0", "H200", {"AForCausalLM": ROUNDED, "BForCausalLM": FOUND["BForCausalLM"]}
)
OWN = CoverageRun("cpu", "float32", transformers.__version__, str(torch.__version__))


def test_table_of_one_column() -> None:
    text = to_markdown([CPU]).replace("\N{EN DASH}", "~")
    assert "|  | CPU float32, 5.24.0 | GPU float32 | GPU bfloat16 |" in text
    assert "| **classes** | **2** | ~ | ~ |\n| served both ways | 0 | ~ | ~ |" in text
    assert "| exact | 1 / 0 | ~ | ~ |\n| refused | 1 | ~ | ~ |\n| failed | 0 / 1 | ~ | ~ |" in text
    assert "| served as packed | 1 failed | ~ | ~ |\n| not served | 1 refused | ~ | ~ |" in text
    assert "| **variants** | **1** | ~ | ~ |\n| variants, served both ways | 1 | ~ | ~ |" in text
    assert "| variants, exact | 1 | ~ | ~ |\n| variants, served as packed | 1 exact | ~ | ~ |" in text
    assert "not run yet" not in text
    first = "| AForCausalLM | packed | exact / failed | ~ | ~ | fails | generate: TypeError: no; not beyond window |"
    assert text.index(first) < text.index("| BForCausalLM |  | refused | ~ | ~ |  | it has \\| no attention |")
    assert "| AForCausalLM+rope | packed | exact | ~ | ~ | the same |  |" in text
    assert drop_in_counts(FOUND) == {"refused": 1, "failed": 1, "exact": 1}


def test_columns_side_by_side() -> None:
    """A route is said where it is another; a remark belongs to its column, or to all."""
    text = to_markdown([CPU, GPU]).replace("\N{EN DASH}", "~")
    assert "| made on | torch 2.13.0 | ~ | torch 2.11.0, H200 |" in text
    assert "| served as single | 0 | ~ | 1 within rounding |" in text
    assert "| tokens that are plain `generate`'s choice | ~ | ~ | 98.61 % |" in text
    remark = "CPU float32: generate: TypeError: no; not beyond window"
    assert (
        f"| AForCausalLM | packed | exact / failed | ~ | within rounding / exact (single) | fails | {remark} |" in text
    )
    assert "| BForCausalLM |  | refused | ~ | refused |  | it has \\| no attention |" in text
    assert "| AForCausalLM+rope | packed | exact | ~ | ~ | the same |  |" in text
    more = replace(CPU, dtype="bfloat16")
    assert "| CPU float32, 5.24.0 | GPU float32 | GPU bfloat16 | CPU bfloat16, 5.24.0 |" in to_markdown([CPU, more])


def test_a_remark_is_of_a_kind_or_of_a_release_or_of_one_column() -> None:
    bad = Verdict("failed", "oh")
    cells = [("cpu", "5.24.0"), ("cuda", "5.17.0"), ("cuda", "5.24.0")]

    def remark(*failed: int) -> str:
        good = FOUND["AForCausalLM+rope"]
        runs = [
            CoverageRun(device, "float32", release, classes={"A": bad if index in failed else good})
            for index, (device, release) in enumerate(cells)
        ]
        return to_markdown(runs).splitlines()[-1].split(" | ")[-1].removesuffix(" |")

    assert remark(0, 1, 2) == "oh"
    assert remark(1, 2) == "GPU float32: oh"
    assert remark(0, 2) == "transformers 5.24.0: oh"
    assert remark(1) == "transformers 5.17.0: oh"
    assert remark(2) == "GPU float32, 5.24.0: oh"


def test_what_was_not_run_yet_of_a_release_is_counted() -> None:
    """What another release lacks is not."""
    partly = replace(GPU, transformers="5.24.0")
    text = to_markdown([CPU, partly]).replace("\N{EN DASH}", "~")
    assert "| not run yet, of that release | 0 | ~ | 1 |" in text
    assert "not run yet" not in to_markdown([CPU, GPU])


def _checked(monkeypatch: pytest.MonkeyPatch, found: dict[str, Verdict], log: str = "") -> dict[str, Any]:
    """Let the command find this; returns what it is asked for."""
    asked: dict[str, Any] = {}

    def check(names: list[str], **arguments: Any) -> Iterator[Checked]:
        asked.update(arguments, names=names)
        yield from (Checked(name, found[name], log) for name in names if name in found)

    monkeypatch.setattr(processes, "check_families", check)
    return asked


def test_a_run_goes_on_where_one_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "table.md"
    verdicts = {"LlamaForCausalLM": FOUND["AForCausalLM+rope"], "GPT2LMHeadModel": Verdict("timed out", "hung")}
    write(out, [replace(OWN, classes=verdicts), GPU])
    asked = _checked(monkeypatch, {"GPT2LMHeadModel": ROUNDED})
    names = ["LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"]
    assert main(["coverage", *names, "--out", str(out), "--resume"]) == 0
    assert asked["names"] == names[1:]
    assert read(out) == [replace(OWN, classes={**verdicts, "GPT2LMHeadModel": ROUNDED}), GPU]
    shown = capsys.readouterr().out
    assert "2/3 GPT2LMHeadModel: within rounding (single) 2 of 72 through submit; exact through generate" in shown
    assert "1 were not started within the limit" in shown


def test_what_is_bad_is_said_with_its_log_and_by_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for status in sorted(BAD):
        _checked(monkeypatch, {"OPTForCausalLM": Verdict(status, "oh")}, "the stack\nof it")
        assert main(["coverage", "OPTForCausalLM"]) == 1
        assert (
            f"1/1 OPTForCausalLM: {status} oh\n    the stack\n    of it\nsubmit: 1 {status}" in capsys.readouterr().out
        )


def test_a_gpu_has_settings_and_a_column_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "start_method", lambda _: ("spawn", "a card"))
    asked = _checked(monkeypatch, {"OPTForCausalLM": ROUNDED})
    out = tmp_path / "table.md"
    write(out, [CPU])
    command = ["coverage", "OPTForCausalLM", "--device", "cuda:0", "--dtype", "bfloat16", "--limit-minutes", "2"]
    assert main([*command, "--out", str(out)]) == 0
    assert (asked["device"], asked["dtype"], asked["method"], asked["timeout"]) == ("cuda:0", "bfloat16", "spawn", 120)
    assert asked["workers"] == min(16, os.cpu_count() or 2)
    assert asked["until"] < float("inf")
    cpu, gpu = read(out)
    assert cpu == CPU
    assert (gpu.device, gpu.card, gpu.classes) == ("cuda", "a card", {"OPTForCausalLM": ROUNDED})


def test_without_a_gpu_it_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none(_: str) -> Any:
        raise RuntimeError("cuda cannot be used: no driver")

    monkeypatch.setattr(processes, "start_method", none)
    assert main(["coverage", "--device", "cuda"]) == 2
    assert "no driver" in capsys.readouterr().err


def test_classes_that_a_release_does_not_have_are_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _checked(monkeypatch, {"OPTForCausalLM": ROUNDED})
    assert main(["coverage", "OPTForCausalLM", "NewForCausalLM"]) == 0
    assert asked["names"] == ["OPTForCausalLM"]
    assert f"not in transformers {transformers.__version__}, skipped: NewForCausalLM\n" in capsys.readouterr().out
    # Those of another column, where all are asked for.
    monkeypatch.setattr(families, "entry_names", lambda: ["OPTForCausalLM"])
    out = tmp_path / "table.md"
    write(out, [CPU])
    assert main(["coverage", "--out", str(out)]) == 0
    assert "skipped: AForCausalLM, AForCausalLM+rope, BForCausalLM\n" in capsys.readouterr().out


def test_files_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, other = tmp_path / "table.md", tmp_path / "machine.json"
    write(out, [CPU])
    other.write_text(to_json([GPU]))
    assert main(["coverage", "--merge", str(other), "--out", str(out)]) == 0
    assert read(out) == [CPU, GPU]
    assert out.read_text() == to_markdown([CPU, GPU])
    assert main(["coverage", "--merge", str(other)]) == 2
    assert "--merge needs --out" in capsys.readouterr().err


def test_what_cannot_be_read_or_written_is_said_before_classes_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "check_families", lambda *_, **__: pytest.fail("it ran"))
    (tmp_path / "file").write_text("")
    absent, table = tmp_path / "absent.json", str(tmp_path / "table.md")
    for arguments, said in (
        (["--out", str(tmp_path / "file" / "table.md")], "its folder cannot be made: "),
        (["--out", str(tmp_path)], f"is a folder: pass --out {tmp_path / 'model-coverage.md'}"),
        (["--out", str(tmp_path / "table.json")], f"written beside it: pass --out {table}"),
        (["--out", table, "--merge", str(absent)], f"--merge: there is no file {absent}"),
    ):
        assert main(["coverage", "OPTForCausalLM", *arguments]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert main(["coverage", "OPTForCausalLM", "--out", table]) == 2
    assert "its folder is not writable" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    out = tmp_path / "new" / "folder" / "table.md"
    names = ["LlamaForCausalLM", "RwkvForCausalLM"]
    assert main(["coverage", *names, "--out", str(out), "--workers", "1", "--dtype", dtype]) == 0
    assert "2/2 RwkvForCausalLM: exact (single)" in capsys.readouterr().out
    (run,) = read_json(out.with_suffix(".json"))
    assert (run.device, run.dtype, run.transformers) == ("cpu", dtype, transformers.__version__)
    assert set(counts(run.classes)) <= SERVED
    assert routes(run.classes) == {"packed": 1, "single": 1}
    assert all(verdict.generate.tokens == 72 for verdict in run.classes.values())


def test_committed_table_is_of_all_classes() -> None:
    runs = read(DOCS / "model-coverage.md")
    assert (DOCS / "model-coverage.md").read_text() == to_markdown(runs)
    (cpu,) = (run for run in runs if (run.device, run.dtype) == ("cpu", "float32"))
    if cpu.transformers == transformers.__version__:
        assert sorted(cpu.classes) == entry_names()
    for statuses in (counts(cpu.classes), drop_in_counts(cpu.classes)):
        assert statuses["exact"] >= 170
        assert not BAD & set(statuses)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_class_of_this_release() -> None:
    found = {each.name: each.verdict for each in check_families(entry_names(), workers=os.cpu_count() or 1)}
    for statuses in (counts(found), drop_in_counts(found)):
        assert not BAD & set(statuses), found
        assert statuses["exact"] >= 105
    for run in read(DOCS / "model-coverage.md"):
        if run.key == OWN.key:
            assert {name: (v.status, v.generate.status, v.route) for name, v in found.items()} == {
                name: (v.status, v.generate.status, v.route) for name, v in run.classes.items()
            }
