"""The order of events, on the simulated device: right under every adversary, wrong without any one wait."""

from __future__ import annotations

import pytest
from support.toy_engine import ToyEngine, run_random_schedule, verify

from hf_async_batching.devices import Guard
from hf_async_batching.scheduler import Scheduler
from hf_async_batching.sequence import Sequence

SCHEDULES = 500


def _wrong_token(depth: int, seed: int, **changes: object) -> bool:
    """Whether a schedule yields a wrong token. One that breaks in another way (a crash, a leak) does not count."""
    engine = ToyEngine(depth, seed, **changes)  # type: ignore[arg-type]
    try:
        requests = run_random_schedule(engine, seed)
    except (AssertionError, IndexError, RuntimeError):
        return False
    try:
        verify(engine, requests)
    except AssertionError as error:
        return "!=" in str(error) or "prefix" in str(error)
    return False


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_random_schedules(depth: int) -> None:
    preemptions = cancels = 0
    for seed in range(SCHEDULES):
        engine = ToyEngine(depth, seed)
        requests = run_random_schedule(engine, seed)
        verify(engine, requests)
        preemptions += engine.scheduler.preemptions
        cancels += list(engine.reasons.values()).count("cancelled")
    assert preemptions > SCHEDULES / 10, "page shortage was hardly exercised"
    assert cancels > SCHEDULES / 10, "cancelling was hardly exercised"


# At depth 2 the host's own wait for the step before implies the waits that protect buffers; at depth 3 nothing does.
NEEDED = [(guard, 3) for guard in Guard] + [
    (guard, 2) for guard in (Guard.INPUT_READY, Guard.OUTPUT_READY, Guard.RESULT_READY, Guard.CALLER_WORK)
]


@pytest.mark.parametrize(("guard", "depth"), NEEDED, ids=lambda value: getattr(value, "name", value))
def test_each_wait_is_needed(guard: Guard, depth: int) -> None:
    assert any(_wrong_token(depth, seed, without=guard) for seed in range(60))
    assert not any(_wrong_token(depth, seed) for seed in range(10))


class FreesPagesAtOnce(Scheduler):
    """Gives pages back when a request ends, not when its last step has completed."""

    def _retire(self, sequence: Sequence) -> None:
        pages, sequence.pages = sequence.pages, []
        self.pages.release(pages)
        super()._retire(sequence)


class RetiresOneStepEarly(Scheduler):
    """Takes a step that is in flight for completed."""

    def _retire(self, sequence: Sequence) -> None:
        sequence.last_step -= 1
        super()._retire(sequence)


@pytest.mark.parametrize("scheduler", [FreesPagesAtOnce, RetiresOneStepEarly])
@pytest.mark.parametrize("depth", [2, 3])
def test_freeing_too_early_is_seen(scheduler: type[Scheduler], depth: int) -> None:
    assert any(_wrong_token(depth, seed, scheduler_class=scheduler) for seed in range(60))
