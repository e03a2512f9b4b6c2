"""The order of events, on the simulated device: right under every adversary, wrong without any one wait."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from typing import Any

import pytest
from support.toy_engine import VOCAB, ToyEngine, reference, run_random_schedule, verify

from hf_async_batching.core.plan import Chunk
from hf_async_batching.core.request import Request
from hf_async_batching.devices.base import Guard
from hf_async_batching.kv_cache.sequence_pages import SequencePages
from hf_async_batching.scheduler.scheduler import Scheduler
from hf_async_batching.scheduler.sequence import Sequence

# Without any one wait, a token is wrong in 1 of 20 schedules or more.
SCHEDULES = 250


def _wrong_token(depth: int, seed: int, conversations: bool = False, **changes: Any) -> bool:
    """Whether a schedule yields a wrong token. One that breaks in another way (a crash, a leak) does not count."""
    engine = ToyEngine(depth, seed, **changes)
    with contextlib.suppress(AssertionError, IndexError, KeyError, RuntimeError):
        run_random_schedule(engine, seed, conversations=conversations)
    return any(got != engine.reference(engine.requests[name])[: len(got)] for name, got in engine.emitted.items())


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_random_schedules(depth: int) -> None:
    preemptions = cancels = 0
    for seed in range(SCHEDULES // 2):
        engine = ToyEngine(depth, seed)
        requests = run_random_schedule(engine, seed)
        verify(engine, requests)
        preemptions += engine.scheduler.preemptions
        cancels += list(engine.reasons.values()).count("cancelled")
    assert preemptions > SCHEDULES / 20, "page shortage was hardly exercised"
    assert cancels > SCHEDULES / 20, "cancelling was hardly exercised"


@pytest.mark.parametrize("depth", [2, 3])
def test_the_depth_may_change_between_steps(depth: int) -> None:
    for seed in range(SCHEDULES // 5):
        engine = ToyEngine(depth, seed)
        rng, step = random.Random(seed), engine.engine.step

        def change_and_step(engine: ToyEngine = engine, rng: random.Random = rng, step: Any = step) -> list[Any]:
            engine.engine.depth = rng.randint(1, depth)
            emissions: list[Any] = step()
            assert len(engine.engine._in_flight) < engine.engine.depth
            return emissions

        engine.engine.step = change_and_step  # type: ignore[method-assign]
        verify(engine, run_random_schedule(engine, seed))
        assert engine.scheduler.finished == len(engine.requests)


# At depth 2 the host's own wait for the step before implies the waits that protect buffers; at depth 3 nothing does.
NEEDED = [(guard, 3) for guard in Guard] + [
    (guard, 2) for guard in (Guard.INPUT_READY, Guard.OUTPUT_READY, Guard.RESULT_READY, Guard.CALLER_WORK)
]


@pytest.mark.parametrize(("guard", "depth"), NEEDED, ids=lambda value: getattr(value, "name", value))
def test_each_wait_is_needed(guard: Guard, depth: int) -> None:
    assert any(_wrong_token(depth, seed, without=guard) for seed in range(60))
    assert not any(_wrong_token(depth, seed) for seed in range(10))


def count_passed(scheduler: Scheduler) -> list[int]:
    """How many pages of a group each look at a window gives back, from now on."""
    counts: list[int] = []
    release = scheduler.kv_cache.release_before_window

    def counted(pages: SequencePages, *rest: int) -> None:
        before = pages.pages_before_window
        release(pages, *rest)
        counts.append(pages.pages_before_window - before)

    scheduler.kv_cache.release_before_window = counted  # type: ignore[method-assign]
    return counts


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 6])
def test_random_schedules_with_a_window(depth: int, window: int) -> None:
    """What lies before the window of all layers is given back, and overwritten at once, while its sequence goes on."""
    passed = 0
    for seed in range(SCHEDULES // 10):
        engine = ToyEngine(depth, seed, window=window)
        counts = count_passed(engine.scheduler)
        verify(engine, run_random_schedule(engine, seed, conversations=seed % 2 == 1))
        passed += sum(counts)
    assert passed > SCHEDULES / 10


# Pages of one layer that sees all and of two kinds that see a window; of two and one; of one and one.
GROUPS = [{"groups": count, "full_attention_groups": full} for count, full in ((3, 1), (3, 2), (2, 1))]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("window", [1, 6])
def test_random_schedules_with_groups_of_layers(depth: int, groups: dict[str, int], window: int) -> None:
    """Pages of groups with a window are given back alone, found again where they are still known, and taken anew."""
    passed = hits = preemptions = evictions = 0
    for seed in range(SCHEDULES // 10):
        pages = (8 + seed % 3) * groups["groups"]
        engine = ToyEngine(depth, seed, window=window, num_pages=pages, draft_rows=seed % 3, **groups)
        counts = count_passed(engine.scheduler)
        verify(engine, run_random_schedule(engine, seed, num_requests=9, conversations=seed % 4 > 0))
        passed += sum(counts)
        hits += engine.scheduler.pages.prefixes.hit_tokens
        evictions += engine.scheduler.pages.prefixes.evictions
        preemptions += engine.scheduler.preemptions
    assert passed > SCHEDULES / 20
    assert hits > SCHEDULES / 2
    assert evictions > SCHEDULES / 20
    assert preemptions


class GivesBackWhatIsSeen(Scheduler):
    """Takes the window for one token narrower than it is."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes, prefix_cache=False)  # which would leave them as they are for a while
        assert self.pages.prefixes.window is not None
        self.pages.prefixes.window -= 1


class GivesBackAtOnce(Scheduler):
    """Gives pages back when the window has passed them, not when the last step that read them has completed."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        release = self.kv_cache.release_before_window
        self.kv_cache.release_before_window = (  # type: ignore[method-assign]
            lambda pages, position, last_step: release(pages, position, -1)
        )


class FindsWhatIsGone(Scheduler):
    """Lets a sequence start behind pages some of which were given up."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.pages.prefixes.usable = lambda node: node  # type: ignore[method-assign]


@pytest.mark.parametrize("wrong", [GivesBackWhatIsSeen, GivesBackAtOnce])
@pytest.mark.parametrize("groups", [{}, *GROUPS], ids=str)
def test_pages_in_the_window_are_needed(wrong: type[Scheduler], groups: dict[str, int]) -> None:
    sizes = {**groups, "num_pages": 8 * groups.get("groups", 1)}
    assert any(_wrong_token(2, seed, window=5, scheduler_class=wrong, **sizes) for seed in range(200))


def test_pages_that_were_given_up_are_needed() -> None:
    sizes = {"groups": 2, "full_attention_groups": 1, "num_pages": 16, "debug": False}
    assert any(_wrong_token(2, seed, True, window=9, scheduler_class=FindsWhatIsGone, **sizes) for seed in range(200))
    assert not any(_wrong_token(2, seed, True, window=9, **sizes) for seed in range(20))


class FreesPagesAtOnce(Scheduler):
    """Gives pages back when a request ends, not when its last step has completed."""

    def _retire(self, sequence: Sequence) -> None:
        ids, sequence.pages.ids, sequence.num_computed = sequence.pages.ids, [], 0
        self.pages.release(ids)
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


# -- the prefix cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_random_conversations(depth: int) -> None:
    """Prompts that share prefixes, in pools that are too small for all of them."""
    hits = evictions = preemptions = 0
    for seed in range(SCHEDULES // 4):
        engine = ToyEngine(depth, seed, num_pages=8 + seed % 7)
        requests = run_random_schedule(engine, seed, num_requests=10, conversations=True)
        verify(engine, requests)
        hits += engine.scheduler.pages.prefixes.hit_tokens
        evictions += engine.scheduler.pages.prefixes.evictions
        preemptions += engine.scheduler.preemptions
    assert hits > SCHEDULES * 8, "pages were hardly found again"
    assert evictions > SCHEDULES, "pages were hardly given up"
    assert preemptions > SCHEDULES / 10, "page shortage was hardly exercised"


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_other_weights_find_nothing_old(depth: int) -> None:
    """Weights change while requests run; the same conversations go on, and those that come after get the new ones."""
    live = 0
    for seed in range(60):
        engine = ToyEngine(depth, seed, num_pages=20)
        for name, request in run_random_schedule(engine, seed, conversations=True).items():
            engine.engine.add(Request("old " + name, request.prompt, 6))
        for _ in range(seed % 12):
            engine.step()
        live += engine.scheduler.num_running
        engine.write_weight(54321)
        engine.engine.weights_updated()
        after = {
            name: Request("new " + name, (*request.prompt, *engine.emitted.get(name, ()), 3), 6)
            for name, request in engine.requests.items()
        }
        for request in after.values():
            engine.engine.add(request)
        while engine.engine.has_work:
            engine.step()
        verify(engine, {request.request_id: request for request in after.values()}, 54321)
    assert live > 60


class FindsPagesOfTheSameStep(Scheduler):
    """Lets a page be found in the step that writes it."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        next_chunk = self._prefill._next_chunk

        def cached_at_once(sequence: Sequence, budget: int) -> Chunk:
            chunk = next_chunk(sequence, budget)
            self._cache_full_pages(sequence)
            return chunk

        self._prefill._next_chunk = cached_at_once  # type: ignore[method-assign]


class FindsPagesBeforeTheyArePlanned(Scheduler):
    """Lets all pages of a prompt be found as soon as it is admitted."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        start = self._prefill._start

        def cached_before(sequence: Sequence, shared: list[int]) -> None:
            start(sequence, shared)
            computed, sequence.num_computed = sequence.num_computed, len(sequence.tokens)
            self._cache_full_pages(sequence)
            sequence.num_computed = computed

        self._prefill._start = cached_before  # type: ignore[method-assign]


class EvictsPagesThatAreHeld(Scheduler):
    """Leaves a page that was found among those that may be given up."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.pages.prefixes.hold = lambda page: None  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "scheduler", [FindsPagesOfTheSameStep, FindsPagesBeforeTheyArePlanned, EvictsPagesThatAreHeld]
)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_the_prefix_cache_must_not_do_is_seen(scheduler: type[Scheduler], depth: int) -> None:
    assert any(_wrong_token(depth, seed, True, scheduler_class=scheduler, debug=False) for seed in range(60))


# -- scores and histories -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_random_schedules_with_scores_and_logits(depth: int) -> None:
    made = 0
    for seed in range(SCHEDULES // 10):
        engine = ToyEngine(depth, seed, outputs=True)
        verify(engine, run_random_schedule(engine, seed))
        made += sum(map(len, engine.made.values()))
    assert made > SCHEDULES, "hardly anything was wanted"


OUTPUT_GUARDS = [(Guard.OUTPUT_FREE, 3)] + [
    (guard, depth) for guard in (Guard.OUTPUT_READY, Guard.RESULT_READY, Guard.CALLER_WORK) for depth in (2, 3)
]


def _wrong_output(depth: int, seed: int, without: Guard | None = None) -> bool:
    """Whether a schedule yields a wrong line of scores or logits for a token whose predecessors were right."""
    engine = ToyEngine(depth, seed, outputs=True, without=without)
    with contextlib.suppress(AssertionError, IndexError, KeyError, RuntimeError):
        run_random_schedule(engine, seed)
    for name, made in engine.made.items():
        want, got = reference(engine.requests[name]), engine.emitted.get(name, [])
        for i, lines in enumerate(made[: len(want)]):
            if got[:i] == want[:i] and any(line is not None and line.tolist() != one_hot(want[i]) for line in lines):
                return True
    return False


def one_hot(token: int) -> list[float]:
    return [float(token == i) for i in range(VOCAB)]


@pytest.mark.parametrize(("guard", "depth"), OUTPUT_GUARDS, ids=lambda value: getattr(value, "name", value))
def test_each_wait_is_needed_by_scores(guard: Guard, depth: int) -> None:
    assert any(_wrong_output(depth, seed, guard) for seed in range(60))
    assert not any(_wrong_output(depth, seed) for seed in range(5))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("conversations", [False, True])
def test_histories_are_whole(depth: int, conversations: bool) -> None:
    """Of rows that were preempted, that found their first pages, that were taken over from others."""
    histories = preemptions = hits = 0
    for seed in range(SCHEDULES // 20):
        engine = ToyEngine(depth, seed, num_pages=8 + seed % 7, remembers=True)
        verify(engine, run_random_schedule(engine, seed, num_requests=9, conversations=conversations))
        assert not engine.wrong_histories
        histories += engine.histories
        preemptions += engine.scheduler.preemptions
        hits += engine.scheduler.pages.prefixes.hit_tokens
    assert histories > SCHEDULES
    assert preemptions > SCHEDULES / 50
    assert not conversations or hits > SCHEDULES


class ForgetsWhatWasFound(Scheduler):
    """Sends no tokens that stand in pages which were found."""

    def plan(self) -> Any:
        plan = super().plan()
        if plan is not None:
            plan = replace(plan, new_rows=tuple(new_row._replace(known=()) for new_row in plan.new_rows))
        return plan


def test_an_incomplete_history_is_seen() -> None:
    wrong = 0
    for seed in range(20):
        engine = ToyEngine(2, seed, remembers=True, scheduler_class=ForgetsWhatWasFound)
        run_random_schedule(engine, seed, num_requests=9, conversations=True)
        wrong += len(engine.wrong_histories)
    assert wrong


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tokens_that_are_chosen_outside(depth: int) -> None:
    """A chooser takes its time; rows of a group advance together; the others do not wait, and rows are preempted."""
    choices = preemptions = 0
    for seed in range(SCHEDULES // 20):
        engine = ToyEngine(depth, seed, num_pages=17 + seed % 4, max_rows=2 + seed % 4, choosers=True)
        verify(engine, run_random_schedule(engine, seed, num_requests=10))
        choices += engine.choices
        preemptions += engine.scheduler.preemptions
    assert choices > SCHEDULES
    assert preemptions > SCHEDULES / 200


class KeepsGoing(Scheduler):
    """Plans rows again whose tokens have not been chosen."""

    def _pause(self, sequences: list[Any]) -> None:
        pass


def test_a_row_that_does_not_wait_for_its_chooser_is_seen() -> None:
    engine = ToyEngine(2, 0, num_pages=17, choosers=True, scheduler_class=KeepsGoing)
    with pytest.raises(AssertionError):
        verify(engine, run_random_schedule(engine, 0, num_requests=10))


def test_groups_that_are_running_in_part_do_not_wait_for_each_other() -> None:
    """Two groups of three on four rows: each has its first members running, and none of them can go on."""
    engine = ToyEngine(2, 1, num_pages=24, max_rows=4, max_batch_tokens=4)
    for i in range(6):
        request = Request(str(i), (1, 2, 3 + i), 5, chooser="outside", group="ab"[i % 2])
        engine.requests[request.request_id] = request
        engine.engine.add(request)
    for _ in range(200):
        if not engine.engine.has_work and not engine.engine.waits_outside:
            break
        if engine.engine.has_work:
            engine.step()
        engine.choose(all_of_them=True)
    verify(engine, engine.requests)
    assert engine.scheduler.preemptions


def test_a_slow_chooser_makes_way_where_others_wait() -> None:
    engine = ToyEngine(2, 1, num_pages=24, max_rows=1, max_batch_tokens=4)
    for i, chooser in enumerate(["outside", None]):
        request = Request(str(i), (1, 2, 3 + i), 5, chooser=chooser)
        engine.requests[request.request_id] = request
        engine.engine.add(request)
    while engine.engine.has_work:
        engine.step()
    assert engine.engine.waits_outside
    assert not engine.reasons
    engine.engine.make_way()
    while engine.engine.has_work:
        engine.step()
    assert engine.reasons == {"1": "length"}
    while engine.engine.waits_outside or engine.engine.has_work:
        engine.choose(all_of_them=True)
        if engine.engine.has_work:
            engine.step()
    verify(engine, engine.requests)
