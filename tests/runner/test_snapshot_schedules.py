"""Rows with states on the simulated device: requests that start behind snapshots, under its adversaries."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from support.toy_engine import ToyEngine, run_random_schedule, verify

from hf_async_batching.core.plan import StateCopy
from hf_async_batching.kv_cache import kv_cache_manager
from hf_async_batching.kv_cache.prefix_cache import PrefixCache
from hf_async_batching.scheduler import waiting_queue
from hf_async_batching.scheduler.scheduler import Scheduler

SCHEDULES = 30


@pytest.fixture(autouse=True)
def short_prompts_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache_manager, "WORTH_A_PIECE", 4)
    monkeypatch.setattr(kv_cache_manager, "WORTH_A_COPY", 4)
    monkeypatch.setattr(waiting_queue, "WORTH_WAITING", 4)


def watch(engine: ToyEngine) -> list[StateCopy]:
    """The copies of all plans from now on."""
    copies: list[StateCopy] = []
    assert engine.states is not None
    copy = engine.states.copy

    def watched(of_step: tuple[StateCopy, ...]) -> None:
        copies.extend(of_step)
        copy(of_step)

    engine.states.copy = watched  # type: ignore[method-assign,assignment]
    return copies


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("snapshots", [1, 3, 8, 20])
def test_random_conversations(depth: int, snapshots: int) -> None:
    """Few places and many, pools of pages that are too small, cancels, ends that the host learns of late."""
    hits = evictions = preemptions = cancels = starts = taken = 0
    for seed in range(SCHEDULES):
        engine = ToyEngine(depth, seed, num_pages=8 + seed % 9, snapshots=snapshots)
        copies = watch(engine)
        requests = run_random_schedule(engine, seed, num_requests=10, conversations=True)
        verify(engine, requests)
        hits += engine.scheduler.pages.prefixes.hit_tokens
        evictions += engine.scheduler.pages.prefixes.evictions
        preemptions += engine.scheduler.preemptions
        cancels += list(engine.reasons.values()).count("cancelled")
        starts += sum(copy.source < 0 for copy in copies)
        taken += sum(copy.target < 0 for copy in copies)
    assert hits > SCHEDULES * 2, "snapshots were hardly found"
    assert starts > SCHEDULES / 2
    assert taken > starts / 2
    assert min(evictions, preemptions, cancels) > SCHEDULES / 10


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("window", [{"window": 6}, {"window": 6, "groups": 3, "full_attention_groups": 1}], ids=str)
def test_with_windows(depth: int, window: dict[str, int]) -> None:
    """Besides the states, a prompt needs the pages that its next token sees."""
    hits = 0
    for seed in range(SCHEDULES):
        pages = (8 + seed % 5) * window.get("groups", 1)
        engine = ToyEngine(depth, seed, num_pages=pages, snapshots=12, **window)
        verify(engine, run_random_schedule(engine, seed, num_requests=10, conversations=True))
        hits += engine.scheduler.pages.prefixes.hit_tokens
    assert hits > SCHEDULES


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_with_choosers(depth: int) -> None:
    hits = 0
    for seed in range(SCHEDULES // 4):
        engine = ToyEngine(depth, seed, num_pages=17 + seed % 4, snapshots=12, choosers=True)
        verify(engine, run_random_schedule(engine, seed, num_requests=10, conversations=True))
        hits += engine.scheduler.pages.prefixes.hit_tokens
    assert hits > SCHEDULES / 4


def test_without_places_nothing_is_found() -> None:
    for seed in range(10):
        engine = ToyEngine(2, seed, snapshots=0)
        verify(engine, run_random_schedule(engine, seed, num_requests=10, conversations=True))
        assert not engine.scheduler.pages.prefixes.hit_tokens
        assert not engine.scheduler.pages.prefixes.num_unheld


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_other_weights_find_no_old_states(depth: int) -> None:
    hits = 0
    for seed in range(SCHEDULES // 3):
        engine = ToyEngine(depth, seed, num_pages=20, snapshots=12)
        run_random_schedule(engine, seed, conversations=True)
        for name, request in list(engine.requests.items())[:3]:
            engine.requests[f"old {name}"] = old = request.__class__("old " + name, request.prompt, 9)
            engine.engine.add(old)
        for _ in range(seed % 12):
            engine.step()
        engine.write_weight(54321)
        engine.engine.weights_updated()
        new = {}
        for turn in range(2):
            for name, request in list(engine.requests.items())[:7]:
                key = f"new {turn} {name}"
                new[key] = engine.requests[key] = request.__class__(key, request.prompt, 6)
                engine.engine.add(new[key])
            while engine.engine.has_work:
                engine.step()
            hits += engine.scheduler.pages.prefixes.hit_tokens
        verify(engine, new, 54321)
    assert hits > SCHEDULES


# -- what must not be, and is seen ------------------------------------------------------------------------------------


class StartsWithoutStates(Scheduler):
    """Lets a prompt start behind any known page."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        prefixes: PrefixCache = self.pages.prefixes
        prefixes.usable = prefixes._in_window  # type: ignore[method-assign]


class TakesSnapshotsLate(Scheduler):
    """Takes the snapshots of decoding rows one step late."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self._late: list[StateCopy] = []
        take = self.kv_cache.take_decode_snapshots

        def late(sequences: Any) -> list[StateCopy]:
            due, self._late = self._late, take(sequences)
            return due

        self.kv_cache.take_decode_snapshots = late  # type: ignore[method-assign]


def _wrong_token(depth: int, seed: int, scheduler_class: type[Scheduler]) -> bool:
    engine = ToyEngine(depth, seed, snapshots=12, num_pages=16, scheduler_class=scheduler_class, debug=False)
    with contextlib.suppress(AssertionError, IndexError, KeyError, RuntimeError):
        run_random_schedule(engine, seed, num_requests=10, conversations=True)
    return any(got != engine.reference(engine.requests[name])[: len(got)] for name, got in engine.emitted.items())


@pytest.mark.parametrize("wrong", [StartsWithoutStates, TakesSnapshotsLate])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_wrong_states_are_seen(depth: int, wrong: type[Scheduler]) -> None:
    assert any(_wrong_token(depth, seed, wrong) for seed in range(60))
    assert not any(_wrong_token(depth, seed, Scheduler) for seed in range(10))
