"""The sequences with a row: in which lists each one stands."""

from __future__ import annotations

from typing import Any

import pytest

from hf_async_batching.core.request import Request
from hf_async_batching.scheduler.running import RunningSequences
from hf_async_batching.scheduler.sequence import Sequence, State


def sequence(name: str, state: State, planned: int = 2, **changes: Any) -> Sequence:
    made = Sequence(Request(name, (1, 2), 2, **changes), 0)
    made.state, made.num_planned, made.num_computed = state, planned, planned - 1
    return made


def names(sequences: list[Sequence]) -> str:
    return "".join(one.request_id for one in sequences)


@pytest.mark.parametrize("with_drafters", [True, False])
def test_each_sequence_stands_where_the_next_step_looks_for_it(with_drafters: bool) -> None:
    running = RunningSequences(with_drafters=with_drafters)
    held = sequence("c", State.DECODING)
    held.paused = True
    for one in (
        sequence("a", State.DECODING),
        sequence("b", State.PREFILLING, lookup_tokens=3),
        held,
        sequence("d", State.DECODING, planned=4),  # its last token is in flight
        sequence("e", State.VERIFYING, lookup_tokens=3),
        sequence("f", State.DECODING, lookup_tokens=3),
    ):
        running.add(one)
    assert (names(running.decoding), names(running.prefilling)) == ("af", "b")
    assert names(running.drafters) == ("bef" if with_drafters else "")
    assert running.youngest.request_id == "f"
    assert [one.request_id for one in reversed(running)] == list("fedcba")
    running.remove(running.youngest)
    assert (names(running.decoding), running.youngest.request_id, len(running)) == ("a", "e", 5)
    held.paused = False
    assert names(running.decoding) == "a", "until it is noted"
    before = running.decoding
    running.changed()
    assert names(running.decoding) == "ac"
    assert running.decoding is not before and names(before) == "a", "a step in flight may hold it"
    assert running.decoding is running.decoding


def test_what_has_ended_is_let_go_of() -> None:
    running = RunningSequences(with_drafters=True)
    made = [sequence("a", State.DECODING, lookup_tokens=3), sequence("b", State.PREFILLING, lookup_tokens=3)]
    for one in made:
        running.add(one)
    assert (names(running.decoding), names(running.prefilling), names(running.drafters)) == ("a", "b", "ab")
    for one in made:
        one.state = State.FINISHED
    running.remove_finished()
    running.let_go()
    assert running._decoding == running._prefilling == running._drafters == list(running) == []


@pytest.mark.parametrize(
    ("state", "planned", "computed", "paused", "right"),
    [
        (State.DECODING, 3, 2, False, True),
        (State.DECODING, 3, 2, True, True),
        (State.DECODING, 3, 3, False, False),
        (State.DECODING, 3, 1, False, False),
        (State.PREFILLING, 2, 0, False, True),
        (State.PREFILLING, 2, 0, True, False),
    ],
)
def test_figures_that_do_not_fit_are_found(
    state: State, planned: int, computed: int, paused: bool, right: bool
) -> None:
    running, one = RunningSequences(with_drafters=False), sequence("a", state, planned)
    one.num_computed, one.paused = computed, paused
    running.add(one)
    if right:
        running.check_invariants()
    else:
        with pytest.raises(AssertionError):
            running.check_invariants()
