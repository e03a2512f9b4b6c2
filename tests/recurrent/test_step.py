"""What layers with states learn of a step: decoding rows, pieces of prompts, and which layer runs."""

from __future__ import annotations

import threading

import pytest
import torch
from recurrent.step_cases import NO_PAGES, Case, context_of

from hf_async_batching.attention.base import MixedContext
from hf_async_batching.kv_cache.state_tables import StateTables
from hf_async_batching.recurrent import calls, reference
from hf_async_batching.recurrent.calls import reads_back
from hf_async_batching.recurrent.step import (
    Piece,
    RecurrentStep,
    active,
    current_step,
    current_tag,
    decoding,
    enter_layer,
    frozen,
    pieces,
)


def step(case: Case | None = None) -> RecurrentStep:
    return RecurrentStep(context_of(case or Case([(1, 3)])), StateTables(4, torch.device("cpu")), {})


def mixed(tiles: list[tuple[int, int, int, int]], decodes: int) -> MixedContext:
    columns = [torch.tensor(column, dtype=torch.int32) for column in zip(*tiles, strict=True)]
    tokens = torch.zeros(sum(tile[2] for tile in tiles), dtype=torch.int32)
    return MixedContext(NO_PAGES, tokens, tokens, *columns, torch.ones(decodes, dtype=torch.int32))


def test_a_step_of_decoding_rows_has_no_pieces() -> None:
    context = context_of(Case([(3, 9), (1, 0), (0, 0)]))
    assert decoding(context) == 3
    assert pieces(context) == []


@pytest.mark.parametrize("tile_size", [1, 2, 3, 5, 16])
def test_tiles_of_a_piece_are_joined(tile_size: int) -> None:
    context = context_of(Case([(5, 7), (2, 4)], [(1, 11, 0), (3, 2, 6), (4, 1, 0)], padding=5), tile_size)
    assert decoding(context) == 2
    assert pieces(context) == [Piece(1, 2, 11, 0), Piece(3, 13, 2, 6), Piece(4, 15, 1, 0)]


def test_padding_is_no_piece() -> None:
    # A tile of the padding row, and one without tokens between two tiles of a row.
    context = mixed([(2, 0, 1, 4), (1, 1, 4, 0), (1, 0, 0, 0), (1, 5, 2, 4), (0, 7, 3, 0), (0, 0, 0, 0)], 1)
    assert pieces(context) == [Piece(1, 1, 6, 0)]


def test_a_tile_elsewhere_in_the_step_is_a_piece_of_its_own() -> None:
    context = mixed([(1, 0, 4, 0), (2, 4, 4, 8), (1, 8, 4, 4), (3, 12, 2, 0)], 0)
    assert decoding(context) == 0
    assert pieces(context) == [Piece(1, 0, 4, 0), Piece(2, 4, 4, 8), Piece(1, 8, 4, 4), Piece(3, 12, 2, 0)]
    apart = mixed([(1, 0, 4, 0), (1, 6, 2, 4)], 0)
    assert pieces(apart) == [Piece(1, 0, 4, 0), Piece(1, 6, 2, 4)]


def test_pieces_are_read_once_in_a_step() -> None:
    context = context_of(Case([], [(1, 11, 0)]))
    assert isinstance(context, MixedContext)
    first = pieces(context)
    context.tile_rows = context.tile_rows * 0  # reading it again would wait for the device again
    assert pieces(context) is first


def test_there_is_a_step_only_while_one_is_offered() -> None:
    with pytest.raises(RuntimeError, match="only inside the engine"):
        current_step()
    offered = step()
    with active(offered):
        assert current_step() is offered
    with pytest.raises(RuntimeError, match="only inside the engine"):
        current_step()


def test_a_step_ends_with_an_error_too() -> None:
    def fail() -> None:
        with active(step()):
            enter_layer(torch.zeros(1))
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        fail()
    with pytest.raises(RuntimeError, match="only inside the engine"):
        current_step()
    with pytest.raises(AssertionError):
        current_tag()


def test_the_layer_that_runs_is_known_by_its_tag() -> None:
    tags, functions = torch.zeros(2, 16, dtype=torch.int32), {"causal_conv1d_fn": torch.relu}
    offered = step()
    offered.mixers.update({tag.data_ptr(): (i, functions) for i, tag in enumerate(tags)})
    with active(offered):
        for index in (1, 0):
            enter_layer(tags[index])
            assert current_step().layer(current_tag()) == (index, functions)


def test_another_thread_has_no_step() -> None:
    errors: list[Exception] = []

    def look() -> None:
        try:
            current_step()
        except RuntimeError as error:
            errors.append(error)

    with active(step()):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        current_step()
    assert len(errors) == 1


def test_steps_are_frozen_where_one_asks_for_it() -> None:
    offered = step()
    with frozen():
        with active(offered):
            assert current_step().frozen
        with active(offered):
            assert current_step().frozen
    with active(offered):
        assert not current_step().frozen
    with pytest.raises(ValueError, match="wrong"), frozen():
        raise ValueError("wrong")
    with active(offered):
        assert not current_step().frozen


@pytest.mark.parametrize("case", [Case([(1, 3), (2, 0)]), Case([(1, 3)], [(2, 4, 0)])], ids=["rows", "mixed"])
def test_frozen_leaves_tables(case: Case) -> None:
    offered = step(case)

    def run() -> None:
        hidden = torch.randn(1, 3, offered.context.rows.shape[0])
        with active(offered):
            reference.causal_conv(current_step(), "conv", lambda window, _weight: window, hidden, torch.ones(3, 4))

    with frozen():
        run()
    table = offered.tables.table("conv", (3, 3), torch.float32)
    assert not table.any()
    run()
    assert table[1].any() and table[2].any()
    assert not table[3].any()


def test_what_reads_on_the_host_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu, conv = torch.device("cpu"), torch.device("cuda"), {"causal_conv1d_fn"}
    for has_triton in (True, False):
        monkeypatch.setattr(calls, "runs_triton", lambda device, has=has_triton: has and device.type == "cuda")
        assert not reads_back(set(), gpu)
        assert not reads_back(conv, cpu)
        assert reads_back(conv, gpu) is not has_triton
        assert reads_back({*conv, "mamba_selective_scan"}, gpu)
        assert reads_back({*conv, "mamba_selective_scan"}, cpu)
