"""The measurement of the host's work runs: its engine is made by hand, from parts whose arguments change."""

from __future__ import annotations

import pytest

from benchmarks.host_work import PARTS, engine_alone, worker_and_handles


@pytest.mark.parametrize("measure", [engine_alone, worker_and_handles])
def test_each_part_of_a_step_takes_time(measure: object) -> None:
    assert callable(measure)
    figures = measure(2, 20, 3)
    assert figures.keys() == {*PARTS, "other", "total"}
    assert all(figures[part] > 0 for part in ("plan", "launch", "complete", "total"))
