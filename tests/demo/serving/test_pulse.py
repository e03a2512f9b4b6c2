"""The live figures and the steps that are drawn."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from support.demo import MACHINE, wait_until_idle
from support.step_records import record

from demo.serving.backend import STAGES, Backend
from demo.serving.errors import BackendFailedError
from demo.serving.pulse import Pulse, drawn_steps, figures_of
from demo.serving.roster import Roster
from demo.serving.serving import Serving
from demo.serving.settings import Settings
from hf_async_batching.bench.measure import Traffic
from hf_async_batching.core.request import Request
from hf_async_batching.engine.stats import Stats


def test_steps_are_drawn_from_the_first_of_them_on() -> None:
    drawn = drawn_steps((record(4, 10.0, 10.2, h2d=(9.9985, 9.9995)), record(5, 10.3, 10.4)))
    assert drawn["steps"][0] == [
        4,
        3,
        0,
        3,
        (0, 1000),
        (203000, 203500),
        (500, 1500),
        (2000, 202000),
        (202000, 202500),
    ]
    assert drawn["steps"][1][6:8] == [None, (302000, 402000)]
    assert drawn["busy"] == 75.0
    assert drawn["ms"] == 200.0
    assert drawn_steps(()) == {"steps": [], "busy": 0.0, "ms": 0.0}


def test_mbu_is_what_steps_read_over_the_time_over_the_bandwidth() -> None:
    class Fake(SimpleNamespace):
        traffic = Traffic(weight_bytes=10**9, bytes_per_context_token=10**6)

    assembly = SimpleNamespace(config=SimpleNamespace(max_rows=8))
    serving: Any = Fake(machine=MACHINE, on_gpu=False, manager=SimpleNamespace(assembly=assembly), roster=Roster())
    records = [record(0, 1.0, 5.0), record(1, 9.0, 9.5), record(2, 9.5, 10.0)]
    figures = figures_of(Stats(prefix_query_tokens=200, prefix_hit_tokens=50), serving, records, now=10.0)
    # Two steps in the last two seconds, from the start of the first of them: 2.06 GB in 1 s, of 5 GB/s.
    assert figures["mbu"] == pytest.approx(41.2)
    assert figures["prefix_hits"] == 25.0
    assert figures_of(Stats(), serving, (), now=10.0)["mbu"] == 0.0


def test_many_pages_share_one_sample(serving: Serving) -> None:
    now, asked = [100.0], []
    pulse = Pulse(Backend(serving), lambda: now[0])
    stats, count = serving.manager.stats, asked.append

    def counting() -> Stats:
        count(1)
        return stats()

    serving.manager.stats = counting  # type: ignore[method-assign]
    try:
        for now[0] in (100.0, 100.1, 100.2, 101.0, 101.1):
            pulse.read()
    finally:
        del serving.manager.stats  # type: ignore[method-assign]
    assert len(asked) == 2
    assert [point[0] for point in pulse.read()["history"]] == [100.0, 101.0]
    assert [point[0] for point in pulse.read(since=100.5)["history"]] == [101.0]
    now[0] = 300.0
    assert [point[0] for point in pulse.read()["history"]] == [300.0], "a minute is remembered"


def test_the_pulse_of_a_real_engine(serving: Serving) -> None:
    pulse = Pulse(Backend(serving))
    pulse.read()
    handle = serving.manager.submit_request(Settings(max_new_tokens=5000, greedy=True).request([1, 2, 3], ()))
    deadline = time.monotonic() + 60
    while (figures := pulse.read()["figures"])["running"] != 1 or not figures["tokens_per_second"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while serving.manager.stats().steps < 24:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    handle.cancel()
    wait_until_idle(serving)
    deadline = time.monotonic() + 60
    while (state := pulse.read())["figures"]["running"] or not state["figures"]["requests_per_second"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert state["stage"][:2] == [STAGES + 1, STAGES]
    assert len(state["steps"]["steps"]) == 24
    assert ("Model", "tiny (random)") in state["facts"]


def test_loading_is_told_stage_by_stage(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[Request] = []
    warmup = serving.manager.warmup

    def watched(requests: list[Request]) -> None:
        warmed.extend(requests)
        warmup(requests)

    monkeypatch.setattr(serving.manager, "warmup", watched)
    backend, pulse, gate, reached = Backend(), None, threading.Event(), threading.Event()

    def load(report: Any) -> Serving:
        report(2, "Unpacking")
        reached.set()
        assert gate.wait(60)
        return serving

    pulse = Pulse(backend)
    assert pulse.read()["stage"] == [1, STAGES, "Starting", False]
    backend.start(load)
    assert reached.wait(60)
    assert pulse.read()["stage"] == [2, STAGES, "Unpacking", False]
    with pytest.raises(BackendFailedError, match="still being loaded"):
        backend.require()
    gate.set()
    deadline = time.monotonic() + 60
    while not backend.warm:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert backend.require() is serving
    assert pulse.read()["stage"] == [STAGES + 1, STAGES, "Ready", False]
    (example,) = warmed
    assert (example.sampling.do_sample, example.sampling.temperature, example.sampling.top_p) == (True, 0.7, 0.9), (
        "steps are captured for answers drawn as the controls stand at first"
    )


def test_a_model_that_does_not_come_up_is_told(caplog: Any) -> None:
    backend = Backend()

    def load(report: Any) -> Serving:
        report(1, "Loading")
        raise OSError("no such file")

    backend.start(load)
    deadline = time.monotonic() + 20
    while not backend.stage.failed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert backend.stage == (1, "OSError: no such file", True)
    with pytest.raises(BackendFailedError, match="no such file"):
        backend.require()
