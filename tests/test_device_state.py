"""The row tables: updates, carry-over, commit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_async_batching import staging
from hf_async_batching.device_state import DeviceState, StepInputs
from hf_async_batching.plan import Chunk, NewPage, NewRow, Plan
from hf_async_batching.request import Request, SamplingParams
from hf_async_batching.staging import Sections, encode

GARBAGE = -123


def make_state() -> DeviceState:
    return DeviceState(max_rows=6, max_pages_per_row=5, device=torch.device("cpu"))


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
    assert state.params.shape == (7, staging.PARAMS)
    assert state.decode_rows.shape == state.out_tokens.shape == state.out_logprobs.shape == (6,)
    for name in ("last_token", "lengths", "page_table", "params", "decode_rows", "out_tokens"):
        assert getattr(state, name).dtype == torch.int32
        assert not getattr(state, name).any()


@pytest.mark.parametrize("with_chunks", [False, True])
def test_updates_touch_what_they_name(with_chunks: bool) -> None:
    state = make_state()
    for table in (state.lengths, state.page_table, state.params, state.decode_rows):
        table.fill_(8)
    plan = Plan(
        0,
        (5, 1),
        (Chunk(2, (9,), True),) if with_chunks else (),
        (NewRow(2, Request("a", (1,), 5, sampling=SamplingParams(top_k=3))), NewRow(4, Request("b", (1,), 5))),
        (NewPage(2, 0, 11), NewPage(2, 4, 12), NewPage(5, 1, 13)),
    )
    state.apply_updates(*stage(plan, bucket=4))
    assert state.lengths.tolist() == [8, 8, 0, 8, 0, 8, 8]
    assert state.params[2, staging.TOP_K] == 3
    assert state.params[4, staging.TOP_K] == 0
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


def test_decode_inputs_are_carried_over() -> None:
    state = make_state()
    state.last_token.copy_(torch.arange(100, 107))
    state.lengths.copy_(torch.arange(10, 17))
    state.lengths[0] = 0
    state.decode_rows.copy_(int32(4, 2, 0, 5, 5, 5))
    inputs = state.decode_inputs(3)
    assert inputs.token_ids.tolist() == [104, 102, 100]
    assert inputs.token_ids.dtype == inputs.position_ids.dtype == torch.int64
    assert inputs.position_ids.tolist() == [14, 12, 0]
    assert inputs.sample_index is None
    context = inputs.context
    assert context.decode
    assert context.rows.tolist() == [4, 2, 0]
    assert context.positions.tolist() == [14, 12, 0]
    assert context.context_lengths is not None
    assert context.context_lengths.tolist() == [15, 13, 1]
    assert context.page_table is state.page_table
    assert state.sampled_rows(inputs).tolist() == [4, 2, 0]
    assert state.next_positions(inputs).tolist() == [15, 13, 1]


def mixed(state: DeviceState) -> StepInputs:
    """Row 4 decodes, rows 2 and 3 compute prompt pieces, row 3 its last one."""
    state.last_token.copy_(torch.arange(100, 107))
    state.lengths.copy_(int32(0, 10, 20, 0, 40, 50, 60))
    plan = Plan(
        0,
        (4,),
        (Chunk(2, (70, 71, 72, 73), False), Chunk(3, (0, 81), True)),
        (NewRow(3, Request("a", (1,), 5)),),
        (NewPage(3, 0, 7),),
    )
    staged, sections = stage(plan)
    state.apply_updates(staged, sections)
    return state.mixed_inputs(staged, sections, num_decodes=1)


def test_mixed_inputs_take_the_hosts_token_where_it_gave_one() -> None:
    state = make_state()
    inputs = mixed(state)
    assert inputs.token_ids.tolist() == [104, 70, 71, 72, 73, 0, 81]
    assert inputs.position_ids.tolist() == [40, 20, 21, 22, 23, 0, 1]
    assert inputs.token_ids.dtype == inputs.position_ids.dtype == torch.int64
    assert inputs.sample_index is not None
    assert inputs.sample_index.tolist() == [0, 6]
    assert inputs.sample_index.dtype == torch.int64
    context = inputs.context
    assert not context.decode
    assert context.rows.tolist() == [4, 2, 2, 2, 2, 3, 3]
    assert context.positions.tolist() == inputs.position_ids.tolist()
    tiles = (context.tile_rows, context.tile_queries, context.tile_lengths, context.tile_positions)
    assert [tile.tolist() for tile in tiles if tile is not None] == [
        [4, 2, 2, 3],
        [0, 1, 4, 5],
        [1, 3, 1, 2],
        [40, 20, 23, 0],
    ]
    assert context.num_decodes == 1
    assert context.context_lengths is not None
    assert context.context_lengths.tolist() == [41], "of the rows that decode"
    assert state.sampled_rows(inputs).tolist() == [4, 3]
    assert state.next_positions(inputs).tolist() == [41, 2]


def test_commit_of_a_mixed_step() -> None:
    state = make_state()
    inputs = mixed(state)
    state.commit(inputs, int32(31, 32), torch.tensor([-0.5, -0.25]))
    assert state.lengths.tolist() == [0, 10, 24, 2, 41, 50, 60]
    assert state.last_token.tolist() == [100, 101, 102, 32, 31, 105, 106]
    assert state.out_tokens[:2].tolist() == [31, 32]
    assert state.out_logprobs[:2].tolist() == [-0.5, -0.25]


def test_commit_of_a_step_that_samples_nothing() -> None:
    state = make_state()
    plan = Plan(0, (), (Chunk(1, (5, 6), False),))
    staged, sections = stage(plan)
    inputs = state.mixed_inputs(staged, sections)
    state.commit(inputs, torch.empty(0, dtype=torch.int32), None)
    assert state.lengths.tolist() == [0, 2, 0, 0, 0, 0, 0]
    assert not state.last_token.any()


def test_commit_of_a_decode_step_and_the_padding_row() -> None:
    """Lengths advance by one per step; row 0 stands at 0 however often it pads."""
    state = make_state()
    state.lengths.copy_(int32(0, 10, 20, 30, 40, 50, 60))
    state.decode_rows.copy_(int32(3, 1, 0, 0, 0, 0))
    state.out_logprobs.fill_(9.0)
    for step in range(3):
        inputs = state.decode_inputs(4)
        assert inputs.position_ids.tolist() == [30 + step, 10 + step, 0, 0]
        state.commit(inputs, int32(60 + step, 70 + step, 1, 2), None)
    assert state.lengths.tolist() == [0, 13, 20, 33, 40, 50, 60]
    assert (state.last_token[3], state.last_token[1]) == (62, 72)
    assert state.last_token[[2, 4, 5, 6]].tolist() == [0] * 4
    assert state.out_tokens[:2].tolist() == [62, 72]
    assert (state.out_logprobs == 9).all(), "nobody asked for them"
    assert state.decode_inputs(2).token_ids.tolist() == [62, 72]
