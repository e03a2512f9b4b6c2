"""Tables and saved steps."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch

from hf_async_batching import BatchingConfig
from hf_async_batching.bench import report
from hf_async_batching.bench.measure import Measured, measure
from hf_async_batching.bench.peer_run import PeerRun
from hf_async_batching.bench.shapes import random_model
from hf_async_batching.bench.workloads import make_workload


@cache
def measured() -> Measured:
    model = random_model("tiny", torch.device("cpu"), torch.float32)
    config = BatchingConfig(depth=2, max_sequence_length=32, cuda_graphs=False)
    return measure(
        model, lambda seed: make_workload("seed", 211, seed=seed, rows=2, prompt=4, new=6), config, 1e9,
        through_engine=True,
    )  # fmt: skip


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_line_of_the_table_has_every_column() -> None:
    failed = PeerRun("generate", error="RuntimeError: a|b\nc")
    ran = PeerRun(
        "generate_batch", "paged|sdpa", {"rows": 2}, ["sdpa failed"], None, 2.0, 12, 6.0, 10.0, equal_to_first_run=0.5
    )
    lines = [*report.header().splitlines(), report.run_row(measured(), 1.0), *map(report.peer_row, (ran, failed))]
    header, _, ours, theirs, broken = map(cells, lines)
    assert {len(cells(line)) for line in lines} == {len(header)}
    assert ours[0] == "hf_async_batching, depth 2, no cuda graphs, engine alone"
    assert ours[1] == f"{measured().run.seconds:.2f}"
    assert ours[header.index("MBU %: decode")] == f"{measured().run.pace.mbu_decode_percent:.1f}"
    assert ours[-1] == "100 % equal to the first row"
    assert theirs[:4] == ["generate_batch, paged/sdpa", "2.00", "6", "10"]
    assert theirs[-1] == "50 % equal to the first row; rows=2; sdpa failed"
    assert broken == ["generate", *["-"] * (len(header) - 2), "failed: RuntimeError: a/b c"]


def test_the_order_of_admission_is_named_where_it_is_another() -> None:
    run = measured().run
    other = replace(measured(), run=replace(run, settings={**run.settings, "admission": "longest_first"}))
    assert "longest first" not in report.run_row(measured(), 1.0)
    assert "depth 2, no cuda graphs, longest first, engine alone" in report.run_row(other, 1.0)


def test_saved_steps_come_back() -> None:
    saved = json.loads(json.dumps(report.save_steps(measured().records)))
    loaded = report.load_steps(saved)
    assert len(loaded) == len(measured().records)
    origin = measured().records[0].plan[0]
    for before, after in zip(measured().records, loaded, strict=True):
        assert after[:5] == before[:5]
        assert after.compute == pytest.approx([at - origin for at in before.compute], abs=1e-6)
        assert (after.h2d is None) == (before.h2d is None)
    assert loaded[0].plan[0] == 0


def test_something_else_has_no_panels() -> None:
    for contents in ({}, {"runs": [{"depth": 1}]}, {"runs": [{"depth": 1, "steps": [{"step": 1}]}]}):
        with pytest.raises(ValueError, match="no measurement of `hf-async-batching bench`"):
            report.panels(contents)
