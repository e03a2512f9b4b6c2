"""From what a step does to its plan, and what is computed once for many steps."""

from __future__ import annotations

from typing import Any

from hf_async_batching.core.plan import Chunk, Given, NewPage, NewRow
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.scheduler.plan_builder import PlanBuilder
from hf_async_batching.scheduler.running import RunningSequences
from hf_async_batching.scheduler.sequence import Sequence, State


def sequence(name: str, row: int, prompt: int = 5, **changes: Any) -> Sequence:
    made = Sequence(Request(name, tuple(range(prompt)), 9, **changes), 0)
    made.pages.row = row
    return made


def decoding(name: str, row: int, **changes: Any) -> Sequence:
    """One whose first token is in flight."""
    made = sequence(name, row, **changes)
    made.num_computed, made.num_planned, made.state = 5, 6, State.DECODING
    return made


def test_what_was_collected_is_in_the_plan_once() -> None:
    builder, one = PlanBuilder(), sequence("a", 2)
    builder.begin()
    builder.new_rows.append(NewRow(2, one.request))
    builder.new_pages.append(NewPage(2, 0, 7))
    builder.given.append(Given(1, 9))
    one.num_computed = 3
    builder.add_chunk(one, Chunk(2, (0, 1, 2), 0))
    plan, sampled, drafts = builder.build([])
    assert (plan.step, plan.decode_rows, plan.chunks) == (0, (), (Chunk(2, (0, 1, 2), 0),))
    assert (plan.new_rows, plan.new_pages, plan.given) == (
        (NewRow(2, one.request),),
        (NewPage(2, 0, 7),),
        (Given(1, 9),),
    )
    assert plan.context_tokens == 3
    assert (sampled, drafts) == ([], ())
    assert (one.num_planned, one.last_step) == (5, 0)
    builder.begin()
    after = builder.build([decoding("b", 1)]).plan
    assert (after.step, after.chunks, after.new_rows, after.new_pages, after.given) == (1, (), (), (), ())


def test_given_tokens_stay_until_a_step_takes_them() -> None:
    builder = PlanBuilder()
    builder.given.append(Given(1, 9))
    builder.begin()
    assert builder.build([decoding("a", 1)]).plan.given == (Given(1, 9),)


def test_decoding_sequences_move_on_by_a_token() -> None:
    builder, rows = PlanBuilder(), [decoding("a", 3), decoding("b", 1)]
    for step in range(3):
        builder.begin()
        plan, sampled, _ = builder.build(rows)
        assert plan.decode_rows == (3, 1)
        assert sampled is rows
        assert [(one.num_computed, one.num_planned, one.last_step) for one in rows] == [(6 + step, 7 + step, step)] * 2
        assert plan.context_tokens == 2 * (6 + step)


def test_rows_that_stay_are_the_same_object() -> None:
    builder, rows = PlanBuilder(), [decoding("a", 3), decoding("b", 1)]
    first = builder.build(rows).plan
    builder.begin()
    assert builder.build(rows[:]).plan.decode_rows is first.decode_rows
    builder.begin()
    fewer = builder.build(rows[:1]).plan
    assert fewer.decode_rows == (3,)
    assert fewer.context_tokens == 8


def test_samples_come_in_the_order_of_the_plan() -> None:
    builder, old = PlanBuilder(), decoding("a", 1)
    part, last, draft = sequence("b", 2), sequence("c", 3), sequence("d", 4)
    draft.draft = (8, 9)
    builder.begin()
    builder.add_chunk(part, Chunk(2, (0, 1), 0))
    builder.add_chunk(last, Chunk(3, (0, 1, 2, 3, 4), 1))
    builder.add_chunk(draft, Chunk(4, (4, 8, 9), 3))
    plan, sampled, drafts = builder.build([old])
    assert sampled == [old, last, draft, draft, draft]
    assert drafts == ((draft, 2, (8, 9)),)
    assert plan.num_sampled == 5
    assert [one.num_planned for one in (part, last, draft)] == [5, 6, 8]


def test_features_follow_the_sequences() -> None:
    builder, plain = PlanBuilder(), decoding("a", 1)
    drawn = decoding("b", 2, sampling=SamplingParams(do_sample=True, top_k=5, logprobs=True))
    assert not builder.build([plain]).plan.features.sampling
    builder.begin()
    both = [plain, drawn]
    features = builder.build(both).plan.features
    assert features.sampling
    assert features.logprobs
    builder.begin()
    assert builder.build(both).plan.features is features
    builder.begin()
    assert not builder.build([plain]).plan.features.sampling


def test_features_of_a_prompt_piece_end_with_it() -> None:
    """A piece that samples nothing leaves the list of sampled sequences as it was."""
    builder, rows = PlanBuilder(), [decoding("a", 1)]
    builder.build(rows)
    kept = sequence("b", 2, output_scores=True)
    builder.begin()
    builder.add_chunk(kept, Chunk(2, (0,), 0))
    with_piece = builder.build(rows).plan.features
    builder.begin()
    after = builder.build(rows).plan.features
    assert after is not with_piece


def test_a_minimum_length_wears_off() -> None:
    builder, rows = PlanBuilder(), [decoding("a", 1, min_new_tokens=3, eos_token_ids=(7,))]
    seen = []
    for _ in range(4):
        builder.begin()
        seen.append(builder.build(rows).plan.features.min_length)
    assert seen == [True, True, False, False]


def test_offers_and_wanted_scores() -> None:
    builder = PlanBuilder()
    rows = [decoding("a", 1), decoding("b", 2, chooser=print), decoding("c", 3, output_scores=True)]
    plan = builder.build(rows).plan
    assert [(offer.sampled, offer.request_id) for offer in plan.offers] == [(1, "b")]
    assert [(run.start, run.stop, run.request_ids) for run in plan.wanted] == [(2, 3, ("c",))]


def test_an_idle_builder_holds_no_sequence() -> None:
    builder, one = PlanBuilder(), sequence("a", 1)
    builder.add_chunk(one, Chunk(1, (0,), 1))
    builder.build([decoding("b", 2)])
    builder.let_go()
    assert builder.prefilled == builder._decoding == builder._sampled == []


def test_running_sequences_are_sorted_again_after_a_change() -> None:
    running = RunningSequences(with_drafters=False)
    first, second = decoding("a", 1), sequence("b", 2)
    second.state = State.PREFILLING
    running.add(first)
    running.add(second)
    before = running.decoding
    assert (before, running.prefilling, running.drafters) == ([first], [second], [])
    assert running.decoding is before
    second.state, second.num_planned, second.num_computed = State.DECODING, 6, 5
    running.changed()
    assert (running.decoding, running.prefilling) == ([first, second], [])
    assert before == [first], "a step in flight may hold it"
    assert running.youngest is second
    first.paused = True
    running.changed()
    assert running.decoding == [second]
    running.remove(second)
    assert list(running) == [first]
    first.state = State.FINISHED
    running.remove_finished()
    assert not len(running)
    assert running.decoding == []
