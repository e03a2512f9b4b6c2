"""Settling the tokens of a step: what callers get, and who has ended."""

from __future__ import annotations

from typing import Any

import pytest

from hf_async_batching.core.request import Request
from hf_async_batching.scheduler.outputs import Settler, TokenOutput
from hf_async_batching.scheduler.sequence import Sequence, State

EOS = 7


def sequence(name: str, new: int = 9, **changes: Any) -> Sequence:
    made = Sequence(Request(name, (1, 2), new, **{"eos_token_ids": (EOS,), **changes}), 0)
    made.state = State.DECODING
    return made


def settle(
    settler: Settler, sequences: list[Sequence], *tokens: int
) -> tuple[list[TokenOutput], list[str], list[str]]:
    outputs, ended, offered = settler.settle(sequences, list(tokens), [None] * len(tokens))
    return outputs, [one.request_id for one in ended], list(offered)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_tokens_go_to_their_sequences_in_order(steps: int) -> None:
    """In the first two steps one by one, and then by the short way."""
    settler, sequences = Settler(), [sequence("a"), sequence("b")]
    for step in range(steps):
        outputs, ended, offered = settler.settle(sequences, [10 + step, 20 + step], [-0.5, None])
        assert outputs == [TokenOutput("a", 10 + step, -0.5), TokenOutput("b", 20 + step)]
        assert all(isinstance(output, TokenOutput) for output in outputs)
        assert not ended
        assert not offered
    assert [one.tokens[2:] for one in sequences] == [[10 + i for i in range(steps)], [20 + i for i in range(steps)]]


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_an_end_of_sequence_ends_its_own_sequence(before: int) -> None:
    settler, sequences = Settler(), [sequence("a"), sequence("b")]
    for _ in range(before):
        assert settle(settler, sequences, 5, 6)[1] == []
    outputs, ended, _ = settle(settler, sequences, EOS, 6)
    assert outputs == [TokenOutput("a", EOS, None, "eos"), TokenOutput("b", 6)]
    assert ended == ["a"]
    assert [one.state for one in sequences] == [State.FINISHED, State.DECODING]
    # A step that was in flight meanwhile: a surplus token.
    assert settle(settler, sequences, 5, 6) == ([TokenOutput("b", 6)], [], [])
    assert settle(settler, sequences, 5, 6) == ([TokenOutput("b", 6)], [], [])
    assert sequences[0].tokens[2:] == [*[5] * before, EOS]


@pytest.mark.parametrize("new", [1, 2, 3, 4])
def test_the_last_token_by_length_ends_a_sequence(new: int) -> None:
    settler, sequences = Settler(), [sequence("a"), sequence("b", new=new)]
    for _ in range(new - 1):
        assert settle(settler, sequences, 5, 6)[1] == []
    assert settle(settler, sequences, 5, 6) == ([TokenOutput("a", 5), TokenOutput("b", 6, None, "length")], ["b"], [])


def test_another_sequences_end_token_is_a_token() -> None:
    settler, sequences = Settler(), [sequence("a"), sequence("b", eos_token_ids=(8,))]
    for _ in range(4):
        outputs, ended, _ = settle(settler, sequences, 8, EOS)
        assert [output.finish_reason for output in outputs] == [None, None]
        assert ended == []


def test_nothing_comes_after_an_end_within_a_step() -> None:
    """Several positions of one sequence: a draft."""
    settler, one = Settler(), sequence("a")
    assert settle(settler, [one] * 3, 5, EOS, 6) == (
        [TokenOutput("a", 5), TokenOutput("a", EOS, None, "eos")],
        ["a"],
        [],
    )
    assert one.tokens == [1, 2, 5, EOS]


def test_a_sequence_with_a_chooser_waits_for_its_token() -> None:
    settler, sequences = Settler(), [sequence("a"), sequence("b", chooser=print)]
    assert settle(settler, sequences, 5, EOS) == ([TokenOutput("a", 5)], [], ["b"])
    assert sequences[1].awaits_choice
    assert sequences[1].tokens == [1, 2]


def test_after_another_end_no_short_way_is_left() -> None:
    settler, sequences = Settler(), [sequence("a"), sequence("b")]
    for _ in range(3):
        settle(settler, sequences, 5, 6)
    sequences[0].state = State.FINISHED  # cancelled
    settler.ended_otherwise()
    assert settle(settler, sequences, 5, 6)[0] == [TokenOutput("b", 6)]
    assert settle(settler, sequences, 5, 6)[0] == [TokenOutput("b", 6)]
    assert len(sequences[0].tokens) == 5


@pytest.mark.parametrize("tokens", [(5,), (5, 6, 7)])
def test_each_position_has_one_token(tokens: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="argument"):
        settle(Settler(), [sequence("a"), sequence("b")], *tokens)


def test_the_second_step_of_the_same_sequences_prepares_the_short_way() -> None:
    settler, sequences = Settler(), [sequence("a"), sequence("b")]
    settle(settler, sequences, 5, 6)
    assert settler._steady is None
    settle(settler, sequences, 5, 6)
    assert settler._steady is not None and settler._steady.sequences is sequences
    settle(settler, sequences, EOS, 6)
    assert settler._steady is None
    assert settle(settler, [], *()) == settle(settler, [], *()) == ([], [], [])
    nothing: list[Sequence] = []
    assert [settle(settler, nothing) for _ in range(3)] == [([], [], [])] * 3


def test_an_equal_list_is_not_the_same_sequences() -> None:
    settler, first, second = Settler(), [sequence("a")], [sequence("b")]
    for _ in range(3):
        settle(settler, first, 5)
    assert settle(settler, second, 6)[0] == [TokenOutput("b", 6)]


def test_an_idle_settler_holds_no_sequence() -> None:
    settler, sequences = Settler(), [sequence("a")]
    for _ in range(3):
        settle(settler, sequences, 5)
    settler.let_go()
    assert settler._last == []
    assert settler._steady is None
