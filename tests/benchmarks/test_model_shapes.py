"""The table of shapes: a line for each phase, whatever becomes of the process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hidden_states import hide_functions
from support.small_shapes import small

from benchmarks import model_shapes
from hf_async_batching.bench.shapes import random_model

SMALL = ["--device", "cpu", "--rows", "1,3", "--prompt", "8", "--new", "12", "--compare", "2"]


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["model_shapes", *arguments])
    ended = model_shapes.main()
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert ended == int(any("error" in line for line in lines))
    return lines


def test_every_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "shapes.json"
    lines = run(monkeypatch, capsys, "--shapes", "huge,tiny", *SMALL, "--out", str(out))
    assert json.loads(out.read_text()) == lines
    failed, start, warmup, one, three, generate = lines
    assert (failed["shape"], failed["phase"]) == ("huge", "start")
    assert failed["error"].startswith("ValueError: there is no shape 'huge'")
    assert [line["shape"] for line in lines[1:]] == ["tiny"] * 5
    assert (start["phase"], start["route"]) == ("start", "packed")
    assert start["first_token_seconds"] > 0
    assert warmup["phase"] == "warmup"
    assert (one["phase"], three["phase"]) == ("rows 1", "rows 3")
    assert three["tokens_per_second"] == pytest.approx(36 / three["seconds"], rel=0.1)
    assert (generate["rows"], generate["identical_rows"], generate["equal_tokens"]) == (2, 2, 1)


def test_the_limit_names_the_phase(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(monkeypatch, capsys, "--shapes", "tiny", *SMALL, "--limit", "0.2")
    assert lines == [{"shape": "tiny", "phase": "start", "error": "not finished in 0.2 s; see stderr"}]


def test_warnings_and_errors_are_lines_of_their_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_functions(monkeypatch, "mamba2_chunk_scan", "causal_conv1d_fn")
    lines: list[dict[str, Any]] = []
    arguments = model_shapes.parser().parse_args(["--shapes", "granite", *SMALL, "--layers", "2"])
    arguments.one = "granite-4-h-tiny"
    shape = model_shapes.ModelShape(arguments, lines.append)
    monkeypatch.setattr(shape, "_rows", lambda rows: 1 / 0)
    model = random_model("granite-4-h-tiny", torch.device("cpu"), torch.float32, **small("granite-4-h-tiny"))
    monkeypatch.setattr("hf_async_batching.bench.shapes.random_model", lambda *_, **__: model)
    shape.run()
    warning = next(line for line in lines if "warning" in line)
    assert warning["phase"] == "start"
    assert "is served through its own cache class" in warning["warning"]
    start = next(line for line in lines if "route" in line)
    assert start["route"] != "packed"
    assert {"phase": "rows 3", "error": "ZeroDivisionError: division by zero"} in lines
    assert lines[-1]["phase"] == "rows 3", "nothing to compare"
