"""Plans that wait for requests which are about to come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.clock_device import PLANNING, ClockDevice, timed_engine
from support.tiny_models import tiny_model
from support.toy_engine import ToyEngine

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.core.plan import Plan
from hf_async_batching.core.request import Request
from hf_async_batching.core.timeline import StepRecord
from hf_async_batching.engine.engine import Engine
from hf_async_batching.engine.plan_delay import ENOUGH, MARGIN, RECENT, PlanDelay
from hf_async_batching.scheduler.scheduler import Scheduler

ROWS, CONTEXT = 4, 400


def record(
    seconds: float = 0.010,
    plan: float = 0.001,
    settle: float = 0.0005,
    prompt_tokens: int = 0,
    rows: int = ROWS,
    context: int = CONTEXT,
    tokens: int | None = None,
) -> StepRecord:
    sampled = rows if tokens is None else tokens
    return StepRecord(
        0,
        rows,
        prompt_tokens,
        sampled,
        context,
        (1.0, 1.0 + plan),
        (2.0, 2.0 + settle),
        (1.5, 1.5 + seconds),
        None,
        None,
    )


def began_at(seconds: float) -> PlanDelay:
    """As after a step that ended then, and whose result was read at once."""
    plan_delay = PlanDelay()
    collect(plan_delay, seconds, seconds - 0.010, seconds)
    return plan_delay


def collect(plan_delay: PlanDelay, arrived: float, began: float, ended: float, waited: bool = False) -> None:
    """A step from its plan on."""
    if waited:
        plan_delay.waited()
    plan_delay.planned(True)
    plan_delay.collected(arrived, began, ended)


def spare(*records: StepRecord, rows: int = ROWS, context: int = CONTEXT, now: float = 5.0) -> float:
    return began_at(5.0).spare_seconds(records, rows, context, now)


USUAL = [record()] * RECENT


def test_the_plan_is_made_shortly_before_it_is_due() -> None:
    assert spare(*USUAL) == pytest.approx(0.010 - 0.0015 - MARGIN)
    assert spare(*USUAL, now=5.004) == pytest.approx(0.006 - 0.0015 - MARGIN)
    assert spare(*[record(seconds=0.002)] * RECENT) < 0, "short steps leave none"


def test_it_counts_the_shortest_step_and_the_usual_host() -> None:
    assert spare(*USUAL, record(seconds=0.006)) == pytest.approx(0.006 - 0.0015 - MARGIN)
    assert spare(*[record(plan=0.004)] * RECENT) == pytest.approx(0.010 - 0.0045 - MARGIN)
    assert spare(*[record(settle=0.0035)] * RECENT) == pytest.approx(0.010 - 0.0045 - MARGIN)
    for other in (0.050, 0.0):
        few = [record(plan=other)] * (RECENT // 2 - 1)
        assert spare(*USUAL, *few) == spare(*USUAL), "somebody had Python's lock, and has it no longer"
    prompts = [record(plan=0.050, prompt_tokens=9)] * (RECENT - ENOUGH)
    assert spare(*USUAL, *prompts) == spare(*USUAL), "their kernels are launched one by one, while the first run"
    assert spare(record(seconds=0.001), *USUAL) == spare(*USUAL), "that was long ago"
    assert spare(*USUAL[1:], record(seconds=0.005)) < spare(*USUAL) and RECENT > ENOUGH > 4


def test_steps_with_prompts_do_not_say_how_long_others_take() -> None:
    prompts = [record(seconds=0.060, prompt_tokens=2048)] * RECENT
    assert spare(*prompts) == 0.0
    assert spare(*prompts, *USUAL[: ENOUGH - 1]) == 0.0
    assert spare(*prompts, *USUAL[:ENOUGH]) == pytest.approx(0.010 - 0.0015 - MARGIN)
    assert spare(*USUAL[: ENOUGH - 1]) == 0.0, "too few"


def test_steps_with_drafts_do_not_either() -> None:
    drafts = [record(seconds=0.030, rows=0, tokens=5), record(seconds=0.030, rows=2, tokens=9)] * RECENT
    assert spare(*drafts) == 0.0
    assert spare(*drafts, *USUAL[:ENOUGH]) == pytest.approx(0.010 - 0.0015 - MARGIN)


def test_a_smaller_step_is_shorter() -> None:
    assert spare(*USUAL, rows=ROWS - 1) == pytest.approx(0.0075 - 0.0015 - MARGIN)
    assert spare(*USUAL, context=CONTEXT // 2) == pytest.approx(0.005 - 0.0015 - MARGIN)
    assert spare(*USUAL, rows=ROWS - 1, context=CONTEXT // 2) == pytest.approx(0.005 - 0.0015 - MARGIN)
    assert spare(*USUAL, rows=ROWS + 1, context=CONTEXT + 9) == spare(*USUAL), "a larger one may be no longer"


def test_waits_are_cut_by_what_they_cost() -> None:
    def after(idle: float, waited: bool = True) -> PlanDelay:
        plan_delay = PlanDelay()
        collect(plan_delay, 4.0, 3.99, 4.0)
        collect(plan_delay, 5.0, 4.0 + idle, 5.0, waited)
        return plan_delay

    def left(plan_delay: PlanDelay) -> float:
        return plan_delay.spare_seconds(USUAL, ROWS, CONTEXT, 5.0)

    assert left(after(0.003, False)) == pytest.approx(0.0065), "no wait is to blame"
    assert left(after(0.0)) == pytest.approx(0.0065)
    assert left(after(-0.001)) == pytest.approx(0.0065), "two clocks"
    plan_delay = after(0.003)
    assert left(plan_delay) == pytest.approx(0.0035 + 0.0001), "of 10 ms a hundredth is paid back"
    assert left(plan_delay) == pytest.approx(0.0035 + 0.0002)
    collect(plan_delay, 6.0, 5.002, 6.0, waited=True)
    assert 0.0065 - plan_delay.spare_seconds(USUAL, ROWS, CONTEXT, 6.0) == pytest.approx(0.0048 - 0.0001), "it adds up"
    plan_delay = after(60.0)
    assert 2400 < sum(left(plan_delay) < 0 for _ in range(2600)) < 2450, "the process was stopped"


def test_the_plan_that_waited_is_to_blame_and_no_other() -> None:
    plan_delay = began_at(5.0)

    def cut() -> bool:
        return plan_delay.spare_seconds(USUAL, ROWS, CONTEXT, plan_delay._began) < 0.0064

    plan_delay.planned(True)  # the step in flight while the next plan waits
    plan_delay.waited()
    plan_delay.planned(True)
    plan_delay.collected(5.02, 5.01, 5.02)
    assert not cut()
    plan_delay.planned(True)
    plan_delay.collected(5.04, 5.03, 5.04)
    assert cut()
    plan_delay._cut = 0.0
    plan_delay.collected(5.06, 5.05, 5.06)
    assert not cut(), "it did not wait"
    plan_delay.waited()
    plan_delay.planned(False)  # there was nothing to do, for a while
    plan_delay.planned(True)
    plan_delay.collected(9.06, 9.05, 9.06)
    assert not cut()


def test_a_result_that_was_read_late_makes_no_step_begin_later() -> None:
    """The device went on while the thread was held up."""
    plan_delay = began_at(5.0)
    collect(plan_delay, 5.010, 5.010 - 0.010, 5.010)
    collect(plan_delay, 5.035, 5.020 - 0.010, 5.020)  # 15 ms late
    assert plan_delay.spare_seconds(USUAL, ROWS, CONTEXT, 5.035) < -MARGIN
    collect(plan_delay, 5.036, 5.030 - 0.010, 5.030)
    assert plan_delay.spare_seconds(USUAL, ROWS, CONTEXT, 5.036) == pytest.approx(0.0005, abs=6e-4)
    collect(plan_delay, 5.040, 5.040 - 0.010, 5.040)
    assert plan_delay.spare_seconds(USUAL, ROWS, CONTEXT, 5.040) == pytest.approx(0.0065, abs=1e-6)


def test_clocks_that_drift_are_brought_together() -> None:
    plan_delay, arrived, ended = began_at(5.0), 5.0, 5.0
    for _ in range(1000):
        arrived, ended = arrived + 0.0100, ended + 0.00999
        collect(plan_delay, arrived, ended - 0.010, ended)
    assert plan_delay.spare_seconds(USUAL, ROWS, CONTEXT, arrived) > 0.0055


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


def test_when_an_engine_can_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ToyEngine(2, 0, max_rows=3).engine
    seen: list[tuple[Any, ...]] = []
    collected: list[tuple[float, ...]] = []
    monkeypatch.setattr(engine.plan_delay, "spare_seconds", lambda *a: seen.append(a) or 0.25)
    monkeypatch.setattr(engine.plan_delay, "collected", lambda *a: collected.append(a))
    assert engine.spare_seconds() == 0.0, "nothing is in flight"
    engine.add(Request("a", (1, 2), 30))
    engine.step()
    assert engine.spare_seconds() == 0.0, "its prompt is in flight"
    for _ in range(3):
        before = time.perf_counter()
        engine.step()
    assert engine.spare_seconds() == 0.25
    records, rows, context, now = seen[0]
    assert records is engine.records
    assert (rows, context) == (1, engine.records[-1].context_tokens + 1)
    assert before < collected[-1][0] < now <= time.perf_counter()
    assert collected[-1][1:] == engine.records[-1].compute
    monkeypatch.setattr(engine.device, "runs_inline", True)
    assert engine.spare_seconds() == 0.0, "what runs inline is never ahead"
    monkeypatch.setattr(engine.device, "runs_inline", False)
    engine.add(Request("b", (1, 2), 30))
    assert engine.spare_seconds() == 0.0, "somebody waits"


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_engine_says_of_every_plan_whether_there_is_a_step(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ToyEngine(depth, 0, max_rows=3).engine
    planned, said = engine.plan_delay.planned, list[bool]()

    def note(launched: bool) -> None:
        said.append(launched)
        planned(launched)

    monkeypatch.setattr(engine.plan_delay, "planned", note)
    engine.add(Request("a", (1, 2), 9))
    while engine.has_work:
        engine.step()
    assert said == [True] * len(engine.records) + [False] * (depth - 1)
    assert not engine.plan_delay._after_a_wait


@pytest.mark.parametrize("depth", [1, 3])
def test_at_other_depths_nothing_waits(depth: int) -> None:
    """One step in flight would be too many to wait for at depth 1, and two would make results wait at depth 3."""
    engine = ToyEngine(depth, 0, max_rows=2).engine
    engine.plan_delay.spare_seconds = lambda *_: 0.25  # type: ignore[method-assign]
    engine.add(Request("a", (1, 2), 30))
    for _ in range(5):
        engine.step()
    assert len(engine._in_flight) == depth - 1
    assert engine.spare_seconds() == 0.0


def serve(
    engine: Engine, device: ClockDevice, late: float = 0.0, oversleeps: Callable[[int], float] = lambda _: 0.0
) -> int:
    """As a worker does; each 25th step its thread is held up. Returns how often plans waited."""
    waits, steps = 0, 0
    while engine.has_work:
        engine.step()
        steps += 1
        device.now += late * (steps % 25 == 0)
        spare = engine.spare_seconds()
        if spare > 0:
            device.now += spare + oversleeps(waits)
            engine.plan_delay.waited()
            waits += 1
    return waits


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("late", [0.0, 0.007])
def test_the_device_never_runs_dry(depth: int, late: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts first, then steps of which each is a little longer, until requests end."""

    def seconds(plan: Plan) -> float:
        return 0.060 if plan.chunks else 0.006 + 0.001 * len(plan.decode_rows) + 1e-6 * plan.context_tokens

    toy, device = timed_engine(depth, seconds, monkeypatch)
    for i in range(3):
        toy.engine.add(Request(str(i), (1,) * 90, 60 + 40 * i))
    waits = serve(toy.engine, device, late)
    assert [gap for gap in device.gaps if gap > PLANNING + 1e-6] == []
    assert waits > 60 if depth == 2 else waits < 3, "at the end one is left"


@pytest.mark.parametrize("every", [1, 3, 10])
def test_who_always_oversleeps_soon_waits_no_more(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that computes beside it can hold Python's lock for longer than a step, however often."""
    toy, device = timed_engine(2, lambda _: 0.010, monkeypatch)
    steps = 1500
    toy.engine.add(Request("0", (1,) * 9, steps))
    waits = serve(toy.engine, device, oversleeps=lambda number: 0.020 * (number % every == 0))
    assert waits > 10
    assert sum(device.gaps) < 0.01 * 0.010 * steps + 0.020, "the last one is not paid back yet"


def test_also_behind_steps_of_drafts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request drafts while it is alone: the model repeats itself. Then it decodes beside another."""
    toy, device = timed_engine(2, lambda _: 0.010, monkeypatch, draft_rows=1)
    toy.engine.add(Request("0", (3,) * 9, 150, lookup_tokens=3))
    while len(toy.engine.records) < RECENT:
        toy.engine.step()
    assert any(step.tokens and not step.decode_rows + step.prompt_tokens for step in toy.engine.records)
    toy.engine.add(Request("1", (3,) * 9, 60))
    assert serve(toy.engine, device) > 10


def test_a_result_that_is_collected_late_is_no_reason_to_wait_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    toy, device = timed_engine(2, lambda _: 0.020, monkeypatch)
    collect, count = toy.engine.pipeline.collect, iter(range(1, 1000))

    def held_up(launch: Any) -> Any:
        result = collect(launch)
        device.now += 0.015 * (next(count) % 25 == 0)
        return result

    monkeypatch.setattr(toy.engine.pipeline, "collect", held_up)
    toy.engine.add(Request("a", (1, 2), 150))
    assert serve(toy.engine, device) > 100
    assert device.gaps == []


@contextmanager
def waiting_before_a_plan(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[GenerationManager, list[float]]]:
    """An engine that waits once for so long, with one request under way, when this is entered; when the wait ended."""
    with GenerationManager(tiny_model("Llama"), BatchingConfig(max_rows=4, max_sequence_length=512)) as manager:
        manager.warmup()
        assembly = manager.assembly
        assert assembly is not None
        engine, waits, spares, ended = assembly.engine, threading.Event(), iter([seconds]), list[float]()

        def spare() -> float:
            if not engine.scheduler.num_running:
                return 0.0
            waits.set()
            return next(spares, 0.0)

        monkeypatch.setattr(engine, "spare_seconds", spare)
        monkeypatch.setattr(engine.plan_delay, "waited", lambda: ended.append(time.perf_counter()))
        manager.submit([5, 6, 7], max_new_tokens=400, eos_token_id=None)
        assert waits.wait(60)
        yield manager, ended


def test_who_comes_meanwhile_is_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.perf_counter()
    with waiting_before_a_plan(3.0, monkeypatch) as (manager, ended):
        handles = [manager.submit([8] * 20, max_new_tokens=2, eos_token_id=None)]
        time.sleep(0.2)  # neither the first one nor somebody who goes ends the wait
        handles[0].cancel()
        handles += [manager.submit([token] * 30, max_new_tokens=2, eos_token_id=None) for token in (9, 10)]
        for handle in handles:
            handle.result()
        assert manager.assembly is not None
        prompts = [step.prompt_tokens for step in manager.assembly.engine.records]
        assert 60 in prompts, "both in one step"
    assert len(ended) == 1
    assert ended[0] - began > 2.9, "to its end"


def test_closing_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with waiting_before_a_plan(120.0, monkeypatch) as (manager, _):
        began = time.perf_counter()
        manager.close()
        assert time.perf_counter() - began < 60


def test_who_takes_no_more_requests_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with waiting_before_a_plan(0.01, monkeypatch) as (manager, ended):
        engine, worker = manager.assembly.engine, manager._engines.thread  # type: ignore[union-attr]
        monkeypatch.setattr(engine, "spare_seconds", lambda: 120.0 * (not worker.accepting))
        worker.drain()
        assert worker.memory_free.wait(60), "the request ends, and with it the engine"
    assert len(ended) == 1
