"""The row tables: updates, carry-over, commit."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from hf_async_batching.attention.base import DecodeContext, MixedContext
from hf_async_batching.core import outcomes, row_layout
from hf_async_batching.core.plan import Chunk, Features, Given, NewPage, NewRow, Plan
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.core.step_layout import Sections
from hf_async_batching.model.forward.step_inputs import StepInputs
from hf_async_batching.runner.row_tables import RowTables
from hf_async_batching.runner.staging import encode

GARBAGE = -123
EOS = 77

# Triton 3.9 announces a change of a compiler default that makes no difference here.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

WAYS = [
    pytest.param(False, id="torch"),
    pytest.param(
        True, id="kernels", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
    ),
]


def make_state(fused: bool = False) -> RowTables:
    return RowTables(max_rows=6, max_pages_per_row=5, device=torch.device("cpu"), fused=fused)


def serving(fused: bool = False) -> RowTables:
    """Row r holds 10 r tokens of at most 100, its last one is 100 + r, and `EOS` ends it."""
    state = make_state(fused)
    for row in range(1, 7):
        state.last_token[row], state.lengths[row] = 100 + row, 10 * row
        state.params[row, row_layout.MAX_LENGTH] = 100
        state.params[row, row_layout.FIRST_EOS :] = -1
        state.params[row, row_layout.FIRST_EOS + row] = EOS
    return state


def stage(plan: Plan, *, bucket: int = 0, send: bool = True, tile_size: int = 3) -> tuple[torch.Tensor, Sections]:
    out = np.full(600, GARBAGE, np.int32)
    sections = encode(plan, out, bucket=bucket or len(plan.decode_rows), send_decode_rows=send, tile_size=tile_size)
    return torch.from_numpy(out), sections


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_tables_start_at_zero() -> None:
    state = make_state()
    assert state.lengths.shape == state.last_token.shape == (7,)
    assert state.page_table.shape == (7, 5)
    assert state.params.shape == (7, row_layout.PARAMS)
    assert state.decode_rows.shape == state.out_tokens.shape == state.out_logprobs.shape == (6,)
    for name in ("last_token", "lengths", "finished", "page_table", "params", "decode_rows", "out_tokens"):
        assert getattr(state, name).dtype == torch.int32
        assert not getattr(state, name).any()


@pytest.mark.parametrize("with_chunks", [False, True])
def test_updates_touch_what_they_name(with_chunks: bool) -> None:
    state = make_state()
    for table in (state.lengths, state.finished, state.page_table, state.params, state.decode_rows):
        table.fill_(8)
    plan = Plan(
        0,
        (5, 1),
        (Chunk(2, (9,), True),) if with_chunks else (),
        (NewRow(2, Request("a", (1,), 5, sampling=SamplingParams(top_k=3))), NewRow(4, Request("b", (1,), 5), 32)),
        (NewPage(2, 0, 11), NewPage(2, 4, 12), NewPage(5, 1, 13)),
    )
    state.apply_updates(*stage(plan, bucket=4))
    assert state.lengths.tolist() == [8, 8, 0, 8, 32, 8, 8]
    assert state.finished.tolist() == [8, 8, 0, 8, 0, 8, 8]
    assert state.params[2, row_layout.TOP_K] == 3
    assert state.params[4, row_layout.TOP_K] == 0
    assert (state.params[[0, 1, 3, 5, 6]] == 8).all()
    expected = torch.full((7, 5), 8)
    expected[2, 0], expected[2, 4], expected[5, 1] = 11, 12, 13
    assert torch.equal(state.page_table.long(), expected)
    # A step with prompts leaves the resident rows alone.
    assert state.decode_rows.tolist() == ([8] * 6 if with_chunks else [5, 1, 0, 0, 8, 8])


def test_an_empty_update_changes_nothing() -> None:
    state = make_state()
    state.lengths.fill_(3)
    state.apply_updates(torch.full((10,), GARBAGE, dtype=torch.int32), Sections())
    assert state.lengths.tolist() == [3] * 7
    assert not state.page_table.any()


@pytest.mark.parametrize("fused", WAYS)
def test_decode_inputs_are_carried_over(fused: bool) -> None:
    state = serving(fused)
    state.decode_rows.copy_(int32(4, 2, 0, 5, 5, 5))
    inputs = state.decode_inputs(3)
    assert inputs.token_ids.tolist() == [104, 102, 0]
    assert inputs.token_ids.dtype == inputs.position_ids.dtype == torch.int64
    assert inputs.position_ids.tolist() == [40, 20, 0]
    assert inputs.sample_index is None
    context = inputs.context
    assert isinstance(context, DecodeContext)
    assert context.rows.tolist() == [4, 2, 0]
    assert context.positions.tolist() == [40, 20, 0]
    assert context.context_lengths.tolist() == [41, 21, 1]
    for tensor in (context.rows, context.positions, context.context_lengths):
        assert tensor.dtype == torch.int32
    assert context.page_table is state.page_table
    assert state.sampled_rows(inputs).tolist() == [4, 2, 0]
    assert state.next_positions(inputs).tolist() == [41, 21, 1]


@pytest.mark.parametrize("fused", WAYS)
def test_a_finished_row_decodes_as_padding(fused: bool) -> None:
    """By an end-of-sequence token or by its length; in later steps it is not read, not written and does not grow."""
    state = serving(fused)
    state.lengths[2] = 97
    state.decode_rows.copy_(int32(1, 2, 3, 4, 0, 0))
    state.commit(state.decode_inputs(5), int32(EOS, 9, 8, EOS + 1, EOS), None)
    assert state.finished.tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert state.lengths.tolist() == [0, 11, 98, 31, 41, 50, 60]
    state.commit(state.decode_inputs(5), int32(3, 9, 8, EOS, EOS), None)
    assert state.finished.tolist() == [0, 1, 1, 0, 1, 0, 0], "row 2 has 99 tokens in the cache, and sampled its last"
    assert state.lengths.tolist() == [0, 11, 99, 32, 42, 50, 60]
    inputs = state.decode_inputs(5)
    assert inputs.context.rows.tolist() == [0, 0, 3, 0, 0]
    assert inputs.token_ids.tolist() == [0, 0, 8, 0, 0]
    assert inputs.position_ids.tolist() == inputs.context.positions.tolist() == [0, 0, 32, 0, 0]
    assert isinstance(inputs.context, DecodeContext)
    assert inputs.context.context_lengths.tolist() == [1, 1, 33, 1, 1]
    state.commit(inputs, int32(1, 2, 3, 4, 5), None)
    assert state.lengths.tolist() == [0, 11, 99, 33, 42, 50, 60]
    assert state.last_token.tolist() == [0, EOS, 9, 3, EOS, 105, 106]
    assert state.out_tokens[:5].tolist() == [1, 2, 3, 4, 5], "the host drops what it does not want"


def test_a_new_request_takes_a_finished_row_over() -> None:
    state = serving()
    state.finished.fill_(1)
    state.apply_updates(*stage(Plan(0, (), (Chunk(3, (5, 6), True),), (NewRow(3, Request("a", (5, 6), 5)),))))
    assert state.finished.tolist() == [1, 1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize("logprobs", [False, True])
def test_commit_of_a_decode_step_and_the_padding_row(fused: bool, logprobs: bool) -> None:
    """Lengths advance by one per step; row 0 stands at 0 however often it pads."""
    state = serving(fused)
    state.decode_rows.copy_(int32(3, 1, 0, 0, 0, 0))
    state.out_logprobs.fill_(9.0)
    scores = torch.tensor([-0.5, -0.25, -1.0, -2.0]) if logprobs else None
    for step in range(3):
        inputs = state.decode_inputs(4)
        assert inputs.position_ids.tolist() == [30 + step, 10 + step, 0, 0]
        state.commit(inputs, int32(60 + step, 70 + step, 1, 2), scores)
    assert state.lengths.tolist() == [0, 13, 20, 33, 40, 50, 60]
    assert state.last_token.tolist() == [0, 72, 102, 62, 104, 105, 106]
    assert not state.finished.any()
    assert state.out_tokens.tolist() == [62, 72, 1, 2, 0, 0]
    assert state.out_logprobs.tolist() == ([-0.5, -0.25, -1.0, -2.0, 9.0, 9.0] if logprobs else [9.0] * 6)
    assert state.decode_inputs(2).token_ids.tolist() == [62, 72]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
@pytest.mark.parametrize("size", [1, 2, 16, 63, 64, 65, 130])
def test_kernels_do_what_the_torch_code_does(size: int) -> None:
    """On random tables, over several steps; entries beyond the first 64 belong to other programs."""
    generator = torch.Generator().manual_seed(size)

    def random(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.int32)

    plain, fused = (
        RowTables(max_rows=140, max_pages_per_row=3, device=torch.device("cpu"), fused=way) for way in (False, True)
    )
    plain.lengths[1:], plain.last_token[1:] = random(30, 140), random(9, 140)
    plain.finished[1:] = random(8, 140) == 0
    plain.params[1:] = random(9, 140, row_layout.PARAMS) - 1
    plain.params[1:, row_layout.MAX_LENGTH] = random(60, 140)
    rows = 1 + torch.randperm(140, generator=generator)[:size].int()
    plain.decode_rows[:size] = torch.where(random(5, size) == 0, 0, rows)
    plain.out_tokens.fill_(GARBAGE)
    plain.out_logprobs.fill_(GARBAGE)
    names = ("lengths", "last_token", "finished", "params", "decode_rows", "out_tokens", "out_logprobs")
    for name in names:
        getattr(fused, name).copy_(getattr(plain, name))
    for step in range(4):
        mine, yours = fused.decode_inputs(size), plain.decode_inputs(size)
        for got, want in zip(_tensors(mine), _tensors(yours), strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
        tokens, scores = random(40, size), torch.rand(size, generator=generator) if step % 2 else None
        fused.commit(mine, tokens, scores)
        plain.commit(yours, tokens, scores)
        for name in names:
            assert torch.equal(getattr(fused, name), getattr(plain, name)), name
    assert plain.finished.any()


def _tensors(inputs: StepInputs) -> Iterator[torch.Tensor]:
    context = inputs.context
    assert isinstance(context, DecodeContext)
    yield from (inputs.token_ids, inputs.position_ids, context.rows, context.positions, context.context_lengths)


@pytest.mark.parametrize("runs", [False, True])
def test_kernels_are_for_devices_that_run_them_or_where_a_caller_says_so(
    runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    assert RowTables(max_rows=1, max_pages_per_row=1, device=device)._fused is False
    monkeypatch.setattr("hf_async_batching.runner.row_tables.runs_triton", lambda _: runs)
    assert RowTables(max_rows=1, max_pages_per_row=1, device=device)._fused is runs
    for fused in (False, True):
        assert make_state(fused)._fused is fused


def mixed(state: RowTables) -> StepInputs:
    """Rows 4 and 5 decode, rows 2 and 3 compute prompt pieces, row 3 its last one."""
    plan = Plan(
        0,
        (4, 5),
        (Chunk(2, (70, 71, 72, 73), False), Chunk(3, (0, 81), True)),
        (NewRow(3, Request("a", (0, 81), 5, eos_token_ids=(EOS,))),),
        (NewPage(3, 0, 7),),
    )
    staged, sections = stage(plan)
    state.apply_updates(staged, sections)
    return state.mixed_inputs(staged, sections, num_decodes=2)


def test_mixed_inputs_take_the_hosts_token_where_it_gave_one() -> None:
    state = serving()
    inputs = mixed(state)
    assert inputs.token_ids.tolist() == [104, 105, 70, 71, 72, 73, 0, 81]
    assert inputs.position_ids.tolist() == [40, 50, 20, 21, 22, 23, 0, 1]
    assert inputs.token_ids.dtype == inputs.position_ids.dtype == torch.int64
    assert inputs.sample_index is not None
    assert inputs.sample_index.tolist() == [0, 1, 7]
    assert inputs.sample_index.dtype == torch.int64
    context = inputs.context
    assert isinstance(context, MixedContext)
    assert context.rows.tolist() == [4, 5, 2, 2, 2, 2, 3, 3]
    assert context.positions.tolist() == inputs.position_ids.tolist()
    tiles = (context.tile_rows, context.tile_queries, context.tile_lengths, context.tile_positions)
    assert [tile.tolist() for tile in tiles if tile is not None] == [
        [4, 5, 2, 2, 3],
        [0, 1, 2, 5, 6],
        [1, 1, 3, 1, 2],
        [40, 50, 20, 23, 0],
    ]
    assert context.num_decodes == 2
    assert context.decode_lengths.tolist() == [41, 51], "of the rows that decode"
    assert state.sampled_rows(inputs).tolist() == [4, 5, 3]
    assert state.next_positions(inputs).tolist() == [41, 51, 2]


def test_a_finished_row_is_padding_beside_prompts_too() -> None:
    state = serving()
    state.finished[4] = 1
    inputs = mixed(state)
    context = inputs.context
    assert context.rows.tolist() == [0, 5, 2, 2, 2, 2, 3, 3]
    assert inputs.token_ids.tolist() == [0, 105, 70, 71, 72, 73, 0, 81]
    assert context.positions.tolist() == inputs.position_ids.tolist() == [0, 50, 20, 21, 22, 23, 0, 1]
    assert isinstance(context, MixedContext)
    assert context.tile_rows.tolist() == [0, 5, 2, 2, 3]
    assert context.tile_positions.tolist() == [0, 50, 20, 23, 0]
    state.commit(inputs, int32(31, 32, 33), None)
    assert state.lengths.tolist() == [0, 10, 24, 2, 40, 51, 60]
    assert state.last_token.tolist() == [0, 101, 102, 33, 104, 32, 106]
    assert state.finished.tolist() == [0, 0, 0, 0, 1, 0, 0]


def test_a_prompt_starts_after_the_tokens_in_its_pages() -> None:
    state = make_state()
    state.lengths.fill_(9)
    pages = (NewPage(3, 0, 7), NewPage(3, 1, 8), NewPage(3, 2, 9))
    plan = Plan(0, (), (Chunk(3, (80, 81, 82, 83), False),), (NewRow(3, Request("a", (1,), 5), 32),), pages)
    staged, sections = stage(plan)
    state.apply_updates(staged, sections)
    inputs = state.mixed_inputs(staged, sections)
    assert inputs.position_ids.tolist() == [32, 33, 34, 35]
    assert isinstance(inputs.context, MixedContext)
    assert inputs.context.tile_positions.tolist() == [32, 35]
    state.commit(inputs, torch.empty(0, dtype=torch.int32), None)
    assert state.lengths.tolist() == [0, 9, 9, 36, 9, 9, 9]


def test_commit_of_a_mixed_step() -> None:
    state = serving()
    inputs = mixed(state)
    state.commit(inputs, int32(31, EOS, 33), torch.tensor([-0.5, -0.25, -0.75]))
    assert state.lengths.tolist() == [0, 10, 24, 2, 41, 51, 60]
    assert state.last_token.tolist() == [0, 101, 102, 33, 31, EOS, 106]
    assert state.finished.tolist() == [0, 0, 0, 0, 0, 1, 0]
    assert state.out_tokens[:3].tolist() == [31, EOS, 33]
    assert state.out_logprobs[:3].tolist() == [-0.5, -0.25, -0.75]


@pytest.mark.parametrize(("max_new_tokens", "token"), [(1, 5), (9, EOS), (9, 5)])
def test_a_request_can_finish_with_its_prompt(max_new_tokens: int, token: int) -> None:
    state = make_state()
    request = Request("a", (5, 6), max_new_tokens, eos_token_ids=(3, EOS))
    staged, sections = stage(Plan(0, (), (Chunk(1, (5, 6), True),), (NewRow(1, request),)))
    state.apply_updates(staged, sections)
    state.commit(state.mixed_inputs(staged, sections), int32(token), None)
    assert state.finished[1] == (max_new_tokens == 1 or token == EOS)


def test_commit_of_a_step_that_samples_nothing() -> None:
    state = make_state()
    plan = Plan(0, (), (Chunk(1, (5, 6), False),))
    staged, sections = stage(plan)
    inputs = state.mixed_inputs(staged, sections)
    state.commit(inputs, torch.empty(0, dtype=torch.int32), None)
    assert state.lengths.tolist() == [0, 2, 0, 0, 0, 0, 0]
    assert not state.last_token.any()


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("fused", WAYS)
def test_what_is_no_token_is_harmless_in_steps_in_flight(fused: bool, decode: bool) -> None:
    """Rows without a token end; a marked token goes on as itself. The host gets what was sampled."""
    state = serving(fused)
    rows = (1, 2, 3, 4, 5)
    staged, sections = stage(Plan(0, rows))
    state.apply_updates(staged, sections)
    if decode:
        inputs = state.decode_inputs(5)
    else:
        staged, sections = stage(Plan(0, rows, chunks=(Chunk(6, (8, 9), 0),)))
        state.apply_updates(staged, sections)
        inputs = state.mixed_inputs(staged, sections)
    marks = int32(outcomes.UNDRAWABLE, outcomes.UNDRAWABLE_UNSOUND, -3 - 40, -3 - EOS, 41)
    state.commit(inputs, marks, None)
    assert state.out_tokens[:5].tolist() == marks.tolist()
    assert state.last_token[1:6].tolist() == [0, 0, 40, EOS, 41]
    assert state.finished[1:6].tolist() == [1, 1, 0, 1, 0]
    assert state.lengths[1:6].tolist() == [11, 21, 31, 41, 51]
    following = state.decode_inputs(5)
    assert following.token_ids.tolist() == [0, 0, 40, 0, 41]
    assert following.context.rows.tolist() == [0, 0, 3, 0, 5]


@pytest.mark.parametrize("fused", WAYS)
def test_rows_with_histories_remember_them_beside_rows_that_mark_what_has_occurred(fused: bool) -> None:
    """Only where a step has no histories do kernels mark what has occurred, and only where that is kept."""
    for memory in (True, False):
        state = RowTables(
            max_rows=2, max_pages_per_row=5, device=torch.device("cpu"), fused=fused, max_length=20, vocab_size=200
        )
        state.memory.ensure(words=memory, seen=True)
        state.last_token[1], state.lengths[1] = 101, 3
        staged, sections = stage(Plan(0, (1,)))
        state.apply_updates(staged, sections)
        state.note(state.decode_inputs(1), Features(seen=True, memory=memory))
        assert state.memory.seen is not None
        assert state.memory.seen[1, 101] & 1
        assert not memory or state.memory.histories_of(int32(1), 4)[0].tolist() == [0, 0, 0, 101]


def test_tables_hold_no_history_that_was_not_asked_for() -> None:
    state = RowTables(max_rows=2, max_pages_per_row=5, device=torch.device("cpu"))
    state.memory.ensure(words=True, seen=True)
    assert state.memory.words is not None and state.memory.seen is not None
    assert state.memory.words.shape == (3, row_layout.HISTORY_START + row_layout.MAX_PADDING)
    assert state.memory.seen.shape == (3, 0)


def test_a_token_from_outside_is_the_next_input_of_its_row() -> None:
    state = serving()
    staged, sections = stage(Plan(0, (3, 5), given=(Given(5, 42), Given(2, 43))))
    state.apply_updates(staged, sections)
    assert state.last_token.tolist() == [0, 101, 43, 103, 104, 42, 106]
    assert state.decode_inputs(2).token_ids.tolist() == [103, 42]


@pytest.mark.parametrize(("pages", "width"), [(1, 4), (4, 4), (5, 8), (8, 8)])
def test_tables_of_groups_are_aligned(pages: int, width: int) -> None:
    """Each group's table starts at a multiple of 16 bytes."""
    state = RowTables(max_rows=6, max_pages_per_row=pages, device=torch.device("cpu"), groups=3)
    assert state.page_table.shape == (3, 7, width)
    one = RowTables(max_rows=6, max_pages_per_row=pages, device=torch.device("cpu"))
    assert one.page_table.shape == (7, pages)


@pytest.mark.parametrize("fused", WAYS)
def test_outcomes_around_token_zero(fused: bool) -> None:
    state = serving(fused)
    state.apply_updates(*stage(Plan(0, (1, 2, 3, 4))))
    marks = [0, outcomes.UNDRAWABLE, outcomes.UNDRAWABLE_UNSOUND, outcomes.FIRST_UNSOUND]
    state.commit(state.decode_inputs(4), int32(*marks), None)
    assert state.last_token[1:5].tolist() == [outcomes.token_of(mark) for mark in marks] == [0, 0, 0, 0]
    assert state.finished[1:5].tolist() == [outcomes.is_undrawable(mark) for mark in marks] == [0, 1, 1, 0]


@pytest.mark.parametrize("fused", WAYS)
def test_positions_of_several_dimensions(fused: bool) -> None:
    """Tokens behind a picture lie elsewhere in each dimension; tokens of padding and of other rows do not."""
    cpu = torch.device("cpu")
    state = RowTables(max_rows=6, max_pages_per_row=5, device=cpu, fused=fused, position_dims=3)
    shifted = Request("a", (1,) * 8, 5, position_shifts=(0, -5, 2))
    plan = Plan(0, (1, 2), new_rows=(NewRow(1, shifted, 8), NewRow(2, Request("b", (1,) * 8, 5), 3)))
    state.apply_updates(*stage(plan, bucket=4))
    decode = state.decode_inputs(4)
    assert decode.position_ids.tolist() == [8, 3, 0, 0]
    assert decode.rope_positions is not None
    assert decode.rope_positions.dtype == torch.int64
    assert decode.rope_positions.tolist() == [[8, 3, 0, 0], [3, 3, 0, 0], [10, 3, 0, 0]]
    staged, sections = stage(Plan(1, (1,), (Chunk(2, (9, 9), True),)), bucket=1)
    mixed = state.mixed_inputs(staged, sections)
    assert mixed.rope_positions is not None
    assert mixed.rope_positions.tolist() == [[8, 3, 4], [3, 3, 4], [10, 3, 4]]
    assert make_state(fused).decode_inputs(2).rope_positions is None
