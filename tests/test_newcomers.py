"""Plans that wait for requests which are about to come."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.tiny_models import tiny_model
from support.toy_engine import ToyEngine

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.newcomers import MARGIN, RECENT, Patience
from hf_async_batching.request import Request
from hf_async_batching.scheduler import Scheduler
from hf_async_batching.timeline import StepRecord


def record(seconds: float = 0.010, plan: float = 0.001, settle: float = 0.0005) -> StepRecord:
    return StepRecord(0, 1, 0, 1, 9, (1.0, 1.0 + plan), (2.0, 2.0 + settle), (1.5, 1.5 + seconds), None, None)


def test_the_plan_is_made_shortly_before_it_is_due() -> None:
    records = [record()] * RECENT
    assert Patience().spare_seconds(records, 1, 5.0, 5.0) == pytest.approx(0.010 - 0.0015 - MARGIN)
    assert Patience().spare_seconds(records, 1, 5.0, 5.004) == pytest.approx(0.006 - 0.0015 - MARGIN)
    assert Patience().spare_seconds(records, 2, 5.0, 5.0) == pytest.approx(0.020 - 0.0015 - MARGIN)


def test_who_wakes_up_late_waits_less() -> None:
    patience, records = Patience(), [record()] * RECENT
    patience.woke(-0.001)
    assert patience.spare_seconds(records, 1, 5.0, 5.0) == pytest.approx(0.0065)
    patience.woke(0.004)
    assert patience.spare_seconds(records, 1, 5.0, 5.0) == pytest.approx(0.0025)
    patience.woke(0.0001)
    assert patience.spare_seconds(records, 1, 5.0, 5.0) == pytest.approx(0.0029), "it is forgotten slowly"
    for _ in range(40):
        patience.woke(0.0001)
    assert patience.spare_seconds(records, 1, 5.0, 5.0) == pytest.approx(0.0064)


def test_it_counts_the_shortest_step_and_the_slowest_host() -> None:
    def spare(*records: StepRecord) -> float:
        return Patience().spare_seconds(records, 1, 0.0, 0.0)

    usual = [record()] * RECENT
    assert spare(*usual, record(seconds=0.006)) == pytest.approx(0.006 - 0.0015 - MARGIN)
    assert spare(*usual, record(plan=0.004)) == pytest.approx(0.010 - 0.0045 - MARGIN)
    assert spare(*usual, record(settle=0.0035)) == pytest.approx(0.010 - 0.0045 - MARGIN)
    assert spare(record(seconds=0.001), *usual) == spare(*usual), "that was long ago"
    assert spare(*[record(seconds=0.002)] * RECENT) < 0, "short steps leave none"


def test_nothing_is_known_or_in_flight() -> None:
    assert Patience().spare_seconds([record()] * (RECENT - 1), 1, 5.0, 5.0) == 0.0
    assert Patience().spare_seconds([record()] * RECENT, 0, 5.0, 5.0) == 0.0, "the device waits for the plan"


def test_who_has_room() -> None:
    scheduler = Scheduler(num_pages=40, page_size=16, max_rows=1, max_batch_tokens=8)
    assert scheduler.has_room
    scheduler.add(Request("a", (1, 2), 9))
    assert not scheduler.has_room, "it is in the next plan, whenever that is made"
    scheduler.plan()
    assert not scheduler.has_room, "no row is free"
    two = Scheduler(num_pages=40, page_size=16, max_rows=2, max_batch_tokens=8)
    two.add(Request("a", (1, 2), 9))
    two.plan()
    assert two.has_room


def test_an_engine_asks_for_its_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ToyEngine(2, 0, max_rows=2).engine
    engine.add(Request("a", (1, 2), 30))
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(engine.patience, "spare_seconds", lambda *a: seen.append(a) or 0.25)
    for _ in range(3):
        before = time.perf_counter()
        engine.step()
    assert engine.spare_seconds() == 0.25
    records, in_flight, arrived, now = seen[0]
    assert records is engine.records and in_flight == 1
    assert before < arrived <= now
    engine.add(Request("b", (1, 2), 30))
    assert engine.spare_seconds() == 0.0, "somebody waits"
    monkeypatch.setattr(engine.device, "runs_inline", True)
    engine.step()
    assert engine.scheduler.has_room is False
    engine.cancel("b")
    assert engine.spare_seconds() == 0.0, "what runs inline is never ahead"


@contextmanager
def waiting_before_a_plan(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[GenerationManager, list[float]]]:
    """An engine that waits once for so long, with one request under way, when this is entered; how late it woke."""
    with GenerationManager(tiny_model("Llama"), BatchingConfig(max_rows=4, max_sequence_length=512)) as manager:
        manager.warmup()
        assembly = manager.assembly
        assert assembly is not None
        engine, waits, spares, late = assembly.engine, threading.Event(), iter([seconds]), list[float]()

        def spare() -> float:
            if not engine.scheduler.num_running:
                return 0.0
            waits.set()
            return next(spares, 0.0)

        monkeypatch.setattr(engine, "spare_seconds", spare)
        monkeypatch.setattr(engine.patience, "woke", late.append)
        manager.submit([5, 6, 7], max_new_tokens=400, eos_token_id=None)
        assert waits.wait(60)
        yield manager, late


def test_who_comes_meanwhile_is_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    with waiting_before_a_plan(2.0, monkeypatch) as (manager, late):
        handles = [manager.submit([8] * 20, max_new_tokens=2, eos_token_id=None)]
        time.sleep(0.2)  # the first one does not end the wait
        handles.append(manager.submit([9] * 30, max_new_tokens=2, eos_token_id=None))
        for handle in handles:
            handle.result()
        assert manager.assembly is not None
        prompts = [step.prompt_tokens for step in manager.assembly.engine.records]
        assert 50 in prompts, "both in one step"
    assert len(late) == 1
    assert -0.01 < late[0] < 60


def test_closing_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with waiting_before_a_plan(120.0, monkeypatch) as (manager, _):
        began = time.perf_counter()
        manager.close()
        assert time.perf_counter() - began < 60
