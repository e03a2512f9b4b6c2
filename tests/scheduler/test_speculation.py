"""Drafts in the engine: tokens as without them, in any company, on a device that takes every liberty."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.oracle import Oracle
from support.tiny_models import EOS, greedy_alone, ragged_prompts, tiny_model
from support.toy_engine import ToyEngine, run_random_schedule, verify

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.plan import NewPage, Plan, Result
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.coverage import families
from hf_async_batching.scheduler import sequence as sequences
from hf_async_batching.scheduler.prompt_lookup import PromptLookup
from hf_async_batching.scheduler.scheduler import Scheduler
from hf_async_batching.scheduler.speculation import DraftInFlight, Drafting

SCHEDULES = 90


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Oracle, "rng", random.Random(0))
    monkeypatch.setattr("hf_async_batching.scheduler.sequence.PromptLookup", Oracle)


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"num_pages": 8}, {"max_batch_tokens": 4}, {"window": 6}], ids=str)
def test_random_schedules(depth: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Oracle, "window", changes.get("window"))
    drafted = accepted = preemptions = 0
    for seed in range(SCHEDULES // 3):
        engine = ToyEngine(depth, seed, draft_rows=1 + seed % 4, **changes)
        verify(engine, run_random_schedule(engine, seed, conversations=seed % 3 == 0))
        drafted += engine.scheduler.drafting.drafted
        accepted += engine.scheduler.drafting.accepted
        preemptions += engine.scheduler.preemptions
    assert drafted > SCHEDULES / 2
    assert drafted / 4 < accepted < drafted
    assert "num_pages" not in changes or preemptions > SCHEDULES / 10


def test_nothing_changes_where_many_run() -> None:
    """Else the running sequences would be sorted anew in every step."""
    scheduler = Scheduler(num_pages=16, page_size=4, max_rows=4, max_batch_tokens=32, draft_rows=1)
    for name in "ab":
        scheduler.add(Request(name, (1, 2, 3, 1, 2, 3), 9, lookup_tokens=4))
    assert scheduler.plan() is not None
    drafters = [sequence for sequence in scheduler._live.values() if sequence.lookup is not None]
    assert len(drafters) == 2
    for _ in range(2):
        assert not scheduler.drafting.choose(drafters, running=2, waiting=0)


class KeepsWhatIsWrong(Drafting):
    """Takes one token more from each draft than was right."""

    def check(self, drafts: tuple[DraftInFlight, ...], *step: Any) -> Any:
        kept, tokens, logprobs = super().check([draft._replace(first=draft.first + 1) for draft in drafts], *step)
        return kept, tokens, logprobs


class GoesOnWithoutPages(Drafting):
    """Drafts beyond the pages that a sequence has."""

    def begin(self, sequence: Any, limit: int) -> list[NewPage]:
        sequence.draft, sequence.restarts = sequence.draft[:limit], False
        return []


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("wrong", [KeepsWhatIsWrong, GoesOnWithoutPages])
def test_what_must_not_be_done_is_seen(wrong: type[Drafting], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_async_batching.scheduler.scheduler.Drafting", wrong)

    def fails(seed: int) -> bool:
        engine = ToyEngine(2, seed, draft_rows=4, debug=False)
        try:
            verify(engine, run_random_schedule(engine, seed))
        except (AssertionError, IndexError, KeyError, RuntimeError):
            return True
        return False

    assert any(fails(seed) for seed in range(30))


# -- the policy -----------------------------------------------------------------------------------------------------


def request(name: str, prompt: tuple[int, ...], new: int = 20, **changes: Any) -> Request:
    return Request(name, prompt, new, lookup_tokens=3, **changes)


def make(**changes: int) -> Scheduler:
    sizes = {"num_pages": 16, "page_size": 4, "max_rows": 4, "max_batch_tokens": 12, "draft_rows": 2, **changes}
    return Scheduler(**sizes)


def planned(scheduler: Scheduler) -> Plan:
    plan = scheduler.plan()
    scheduler.check_invariants()
    assert plan is not None
    return plan


def settle(scheduler: Scheduler, plan: Plan, *tokens: int) -> list[tuple[int | None, str | None]]:
    emissions = scheduler.complete(Result(plan.step, list(tokens)))
    scheduler.check_invariants()
    return [(emission.token, emission.finish_reason) for emission in emissions]


def pieces(plan: Plan) -> list[tuple[tuple[int, ...], int]]:
    return [(chunk.tokens, chunk.samples) for chunk in plan.chunks]


def test_a_draft_is_computed_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[tuple[int, ...]] = []
    original = PromptLookup.judged
    monkeypatch.setattr(PromptLookup, "judged", lambda self, *told: (judged.append(told), original(self, *told))[1])
    scheduler = make()
    scheduler.add(request("a", (1, 2, 3, 4, 5, 9)))
    settle(scheduler, planned(scheduler), 1)  # 1 has stood before: 2, 3, 4 may follow
    plan = planned(scheduler)
    assert pieces(plan) == [((1, 2, 3, 4), 4)]
    assert plan.decode_rows == ()
    assert [(row.start, row.again) for row in plan.new_rows] == [(6, True)]
    assert plan.num_sampled == plan.num_tokens == 4
    assert plan.num_prompt_tokens == 0
    # Right are 2 and 3; 8 is what follows them.
    assert settle(scheduler, plan, 2, 3, 8, 77) == [(2, None), (3, None), (8, None)]
    assert judged == [(3, 2, 10)], "7 tokens before, 2 of the draft, and the one that follows them"
    plan = planned(scheduler)
    assert pieces(plan) == [((8,), 1)], "nothing followed 8 before"
    assert plan.num_prompt_tokens == 0
    assert [(row.start, row.again) for row in plan.new_rows] == [(9, True)]
    settle(scheduler, plan, 60)
    plan = planned(scheduler)
    assert (plan.decode_rows, plan.new_rows, plan.chunks) == ((1,), (), ()), "carry-over again"
    assert (scheduler.drafting.drafted, scheduler.drafting.accepted) == (3, 2)


def test_who_could_draft_waits_for_its_tokens_and_nobody_else_does() -> None:
    scheduler = make()
    scheduler.add(request("a", (1, 2, 3, 4, 5)))
    scheduler.add(Request("b", (1, 2, 3, 4, 5), 20))
    first = planned(scheduler)
    second = planned(scheduler)
    assert second.decode_rows == (1, 2)
    settle(scheduler, first, 2, 2)  # behind 2 stood 3, 4, 5, and its next token is in flight
    third = planned(scheduler)
    assert third.decode_rows == (2,)
    settle(scheduler, second, 3, 3)
    fourth = planned(scheduler)
    assert fourth.decode_rows == (2,)
    assert pieces(fourth) == [((3, 4, 5, 2), 4)]
    fifth = planned(scheduler)
    assert fifth.decode_rows == (2,)
    assert fifth.chunks == ()
    settle(scheduler, third, 60)
    # b's token, and all of a's draft with one more.
    assert settle(scheduler, fourth, 61, 4, 5, 2, 3) == [(61, None), (4, None), (5, None), (2, None), (3, None)]


def test_who_was_held_for_nothing_goes_on() -> None:
    scheduler = make()
    scheduler.add(request("a", (1, 2, 3, 4, 5)))
    first, second = planned(scheduler), planned(scheduler)
    settle(scheduler, first, 2)
    assert scheduler.plan() is None
    settle(scheduler, second, 60)
    plan = planned(scheduler)
    assert (plan.decode_rows, plan.chunks) == ((1,), ())


def test_who_is_held_for_nothing_again_and_again_is_held_ever_less() -> None:
    """A draft that is dropped costs a step, as one that is wrong does: it rests for 1, 2, 4 and 8 tokens."""
    scheduler = make(page_size=64)
    scheduler.add(request("a", (1, 2, 3, 4, 5), new=40))
    current, held = planned(scheduler), []
    for position in range(24):
        ahead = scheduler.plan()
        if ahead is None:
            held.append(position)
        # Something followed 2 before; nothing followed the others.
        settle(scheduler, current, 60 + position if position % 2 else 2)
        current = ahead or planned(scheduler)
    assert held == [1, 3, 7, 13, 23]


def test_nobody_drafts_among_many_or_while_others_wait() -> None:
    prompt = (1, 2, 3, 4, 5)
    many = make(draft_rows=2)
    for name in "abc":
        many.add(request(name, prompt))
    settle(many, planned(many), 2, 2)
    settle(many, planned(many), 2, 2, 2)
    assert planned(many).decode_rows == (1, 2, 3)
    waiting = make(max_rows=1)
    for name in "ab":
        waiting.add(request(name, prompt))
    settle(waiting, planned(waiting), 2)
    assert planned(waiting).decode_rows == (1,)
    never = make(draft_rows=0)
    never.add(request("a", prompt))
    settle(never, planned(never), 2)
    assert planned(never).decode_rows == (1,)


def test_among_many_nobody_looks_for_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(Drafting, "_update", lambda self, *_: looks.append(1) and False)
    for rows, count in ((0, 0), (2, 1)):
        scheduler = make(draft_rows=rows)
        for name in "ab":
            scheduler.add(request(name, (1, 2, 3, 4, 5)))
        settle(scheduler, planned(scheduler), 60, 61)
        scheduler.add(request("c", (1, 2, 3, 4, 5)))  # it waits, and then there are three
        looks.clear()
        settle(scheduler, planned(scheduler), 62, 63, 64)
        for _ in range(5):
            settle(scheduler, planned(scheduler), 65, 66, 67)
        assert len(looks) <= count


def test_who_is_held_when_others_come_goes_on() -> None:
    scheduler = make(draft_rows=1)
    scheduler.add(request("a", (1, 2, 3, 4, 5)))
    first, second = planned(scheduler), planned(scheduler)
    settle(scheduler, first, 2)
    assert scheduler.plan() is None
    scheduler.add(Request("b", (7,), 20))
    assert planned(scheduler).decode_rows == (1,)
    settle(scheduler, second, 60)


def test_ends_within_a_draft() -> None:
    scheduler = make()
    scheduler.add(request("a", (1, 2, 3, 4, 5, 9), eos_token_ids=(4,)))
    settle(scheduler, planned(scheduler), 1)
    plan = planned(scheduler)
    assert pieces(plan) == [((1, 2, 3), 3)], "nothing is drafted behind an end"
    assert settle(scheduler, plan, 2, 3, 4) == [(2, None), (3, None), (4, "eos")]
    assert scheduler.pages.in_use == scheduler.rows.in_use == 0
    scheduler.add(request("b", (1, 2, 3, 4, 5, 9), eos_token_ids=(7,)))
    settle(scheduler, planned(scheduler), 1)
    assert settle(scheduler, planned(scheduler), 2, 7, 4, 5) == [(2, None), (7, "eos")]
    assert scheduler.pages.in_use == scheduler.rows.in_use == 0


def test_a_draft_ends_before_the_length() -> None:
    scheduler = make()
    scheduler.add(request("a", (1, 2, 3, 4, 5, 9), new=4))
    settle(scheduler, planned(scheduler), 1)
    plan = planned(scheduler)
    assert pieces(plan) == [((1, 2, 3), 3)]
    assert settle(scheduler, plan, 2, 3, 4) == [(2, None), (3, None), (4, "length")]


def test_a_draft_takes_no_page_from_others() -> None:
    """All pages are taken: what is computed ahead, and the token behind it, must stand in a's own two."""
    for length, drafted in ((5, 1), (6, 0)):
        scheduler = make(num_pages=3)
        scheduler.add(request("a", tuple(range(1, length + 1)), new=6))
        scheduler.add(Request("b", (70,), 2))
        settle(scheduler, planned(scheduler), 1, 80)
        plan = planned(scheduler)
        assert pieces(plan) == ([((1, 2), 2)] if drafted else [])
        assert plan.decode_rows == ((2,) if drafted else (1, 2))


def test_a_cancelled_draft_brings_nothing() -> None:
    scheduler = make()
    scheduler.add(request("a", (1, 2, 3, 4, 5, 9)))
    settle(scheduler, planned(scheduler), 1)
    plan = planned(scheduler)
    scheduler.cancel("a")
    assert scheduler.pages.in_use > 0
    assert settle(scheduler, plan, 2, 3, 4, 5) == []
    assert scheduler.pages.in_use == scheduler.rows.in_use == 0


@pytest.mark.parametrize(
    ("changes", "drafts"),
    [
        ({}, True),
        ({"sampling": SamplingParams(do_sample=True, top_k=5, logprobs=True)}, True),
        ({"min_new_tokens": 3}, True),
        ({"sampling": SamplingParams(do_sample=True, top_h=0.5)}, False),
        ({"logits": LogitsParams(repetition_penalty=1.5)}, False),
        ({"output_scores": True}, False),
        ({"output_logits": True}, False),
        ({"prompt_embeddings": "opaque"}, False),
    ],
)
def test_what_goes_with_drafts(changes: dict[str, Any], drafts: bool) -> None:
    scheduler = make()
    scheduler.add(request("a", (1, 2, 3, 4, 5, 9), eos_token_ids=(80,), **changes))
    settle(scheduler, planned(scheduler), 1)
    assert bool(planned(scheduler).chunks) == drafts


def test_a_minimum_length_within_a_draft_is_kept() -> None:
    """The draft's first position is below it, its last one is not."""
    scheduler = make()
    scheduler.add(request("a", (1, 2, 3, 4, 5, 9), eos_token_ids=(80,), min_new_tokens=3))
    settle(scheduler, planned(scheduler), 1)
    assert planned(scheduler).features.min_length


# -- a real model -----------------------------------------------------------------------------------------------------

PROMPTS = ragged_prompts(4, 24)
CONFIG = BatchingConfig(page_size=16, debug=True)


class Told(PromptLookup):
    """Has been told what follows, and is wrong in every third draft."""

    whole: tuple[list[int], ...] = ()
    drafts = 0

    def find(self, tokens: Sequence[int], limit: int) -> tuple[int, ...]:
        known = next((one for one in self.whole if one[: len(tokens)] == list(tokens)), None)
        if known is None:
            return ()
        draft = known[len(tokens) :][: min(limit, self._num_tokens)]
        Told.drafts += 1
        if draft and Told.drafts % 3 == 0:
            draft[-1] = (draft[-1] + 1) % 90
        return tuple(draft)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[list[int]]], None]:
    monkeypatch.setattr("hf_async_batching.scheduler.sequence.PromptLookup", Told)

    def tell(whole: list[list[int]]) -> None:
        monkeypatch.setattr(Told, "whole", tuple(whole))

    return tell


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama")


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2"])
def test_tokens_of_generate(name: str, depth: int, told: Any) -> None:
    model = tiny_model(name)
    expected = [greedy_alone(model, prompt, 60, eos_token_id=None) for prompt in PROMPTS]
    told([prompt + tokens for prompt, tokens in zip(PROMPTS, expected, strict=True)])
    with GenerationManager(model, replace(CONFIG, depth=depth)) as manager:
        settings = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "prompt_lookup_num_tokens": 5}
        handles = [manager.submit(prompt, **settings) for prompt in PROMPTS]
        results = [handle.result(60) for handle in handles]
        assert [result.token_ids for result in results] == expected
        assert [result.metrics.cached_prompt_tokens for result in results] == [0] * 4
        stats = manager.stats()
        assert 120 < stats.accepted_tokens < stats.drafted_tokens
        assert stats.steps < 120
        records = manager.timeline().steps
        # Of a draft whose request ends within it, the last tokens are nobody's.
        assert sum(record.tokens for record in records) == 240
        assert sum(record.prompt_tokens for record in records) == sum(map(len, PROMPTS))


def test_plain_prompt_lookup(model: Any, told: Any) -> None:
    """The same tokens, and for more than one row, which transformers refuses."""
    ids = torch.tensor([PROMPTS[1]])
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": EOS}
    lookup = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 3}
    expected = model.generate(ids, **settings, **lookup)
    told(expected.tolist())
    with GenerationManager(model, CONFIG) as manager:
        serve = manager.bind()
        assert torch.equal(model.generate(ids, custom_generate=serve, **settings, **lookup), expected)
        twice = model.generate(ids.repeat(2, 1), custom_generate=serve, **settings, **lookup)
        assert torch.equal(twice, expected.repeat(2, 1))
        assert manager.stats().accepted_tokens > 30


def test_draws_are_those_without_drafts(model: Any, told: Any) -> None:
    settings = {"max_new_tokens": 50, "do_sample": True, "top_k": 7, "eos_token_id": None, "logprobs": True}
    with GenerationManager(model, CONFIG) as manager:
        plain = [manager.submit(PROMPTS[1], seed=seed, **settings).result(60) for seed in range(4)]
        assert len({tuple(result.token_ids) for result in plain}) == 4
        for seed, expected in enumerate(plain):
            told([PROMPTS[1] + expected.token_ids])
            accepted = manager.stats().accepted_tokens
            result = manager.submit(PROMPTS[1], seed=seed, prompt_lookup_num_tokens=4, **settings).result(60)
            assert result.token_ids == expected.token_ids
            assert result.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
            assert manager.stats().accepted_tokens > accepted + 20


@pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "max_matching_ngram_size"])
def test_values_that_make_no_sense(model: Any, name: str) -> None:
    with GenerationManager(model, CONFIG) as manager, pytest.raises(ValueError, match=f"`{name}` must be"):
        manager.submit(PROMPTS[0], max_new_tokens=3, **{name: 0})


def test_states_that_cannot_go_back_are_served_without(told: Any) -> None:
    model = families.tiny_model("MambaForCausalLM")
    expected = greedy_alone(model, PROMPTS[1], 12, eos_token_id=None)
    told([PROMPTS[1] + expected])
    with GenerationManager(model, CONFIG) as manager:
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "prompt_lookup_num_tokens": 3}
        assert manager.submit(PROMPTS[1], **settings).result(60).token_ids == expected
        assert manager.stats().drafted_tokens == 0


@pytest.mark.parametrize(
    ("changes", "drafts"),
    [
        ({"lookup_tokens": 3}, True),
        ({}, False),
        ({"lookup_tokens": 3, "prompt_embeddings": "opaque"}, False),
        ({"lookup_tokens": 3, "output_scores": True}, False),
        ({"lookup_tokens": 3, "chooser": print}, False),
        ({"lookup_tokens": 3, "sampling": SamplingParams(do_sample=True, top_k=5, seed=1)}, True),
        ({"lookup_tokens": 3, "logits": LogitsParams(repetition_penalty=1.2)}, False),
    ],
    ids=str,
)
def test_who_can_draft(changes: dict[str, Any], drafts: bool) -> None:
    assert (sequences.Sequence(Request("a", (5, 6), 9, **changes), 0).lookup is not None) == drafts


def test_a_draft_fills_the_step_to_its_last_token() -> None:
    for room, drafted in ((4, 3), (3, 2), (2, 1)):
        scheduler = make(max_batch_tokens=room, max_rows=2)
        scheduler.add(request("a", (1, 2, 3, 4, 5, 9)))
        plan = planned(scheduler)
        while not plan.num_sampled:
            settle(scheduler, plan)
            plan = planned(scheduler)
        settle(scheduler, plan, 1)
        assert pieces(planned(scheduler)) == [((1, *(2, 3, 4)[:drafted]), 1 + drafted)]


def test_the_last_free_page_is_enough_for_a_draft() -> None:
    scheduler = make(num_pages=4)
    scheduler.add(request("a", (1, 2, 3, 4, 5, 6), new=6))
    scheduler.add(Request("b", (70,), 2))
    settle(scheduler, planned(scheduler), 1, 80)
    assert scheduler.pages.available == 1
    assert pieces(planned(scheduler)) == [((1, 2, 3, 4), 4)]
