"""Who may run next."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from demo.serving.errors import LineFullError
from demo.serving.line import Line
from demo.serving.roster import Capacity, Roster


def test_places_move_up_as_others_leave() -> None:
    line = Line(running=2, waiting=2)
    tickets = [line.join() for _ in range(4)]
    assert [ticket.place for ticket in tickets] == [0, 0, 1, 2]
    with pytest.raises(LineFullError, match="2 others are waiting"):
        line.join()
    with tickets[1]:
        pass
    assert [ticket.place for ticket in (tickets[0], tickets[2], tickets[3])] == [0, 0, 1]
    with ExitStack() as stack:
        for ticket in tickets:
            stack.enter_context(ticket)
    assert line.join().place == 0


def test_the_engine_s_queue_is_counted_in_the_order_of_arrival(make_manager: Any) -> None:
    from demo.serving.settings import Settings

    manager, roster = make_manager([1, 2, 3]), Roster()
    manager.start = False
    handles = [manager.submit_request(Settings().request([1], ())) for _ in range(4)]
    roster.add(*handles)
    assert roster.places() == {handle.request_id: place for place, handle in enumerate(handles, 1)}
    handles[0].started = True
    handles[2].cancel()
    assert roster.places() == {handles[1].request_id: 1, handles[3].request_id: 2}


def test_one_owner_never_takes_every_place() -> None:
    line = Line(running=3, waiting=4, running_each=2, waiting_each=2)
    own = [line.join("a") for _ in range(4)]
    assert [ticket.place for ticket in own] == [0, 0, 1, 2]
    with pytest.raises(LineFullError, match="4 from your address"):
        line.join("a")
    other = line.join("b")
    assert other.place == 0
    line.leave(own[0])
    assert [ticket.place for ticket in own[1:]] == [0, 0, 1]
    assert other.place == 0, "what runs goes on running"


def request(prompt: int = 4, new: int = 10) -> Any:
    from demo.serving.settings import Settings

    return Settings(max_new_tokens=new).request([1] * prompt, ())


def admitted(roster: Roster, owner: str, count: int, **sizes: int) -> int:
    requests = [request(**sizes) for _ in range(count)]
    for one in requests:
        roster.ask(one, owner)
    return sum(roster.may_enter(one) for one in requests)


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ({}, 14),  # two rows stay free
        ({"prompt": 4, "new": 996}, 8),  # of 10,000 tokens an eighth stays free
        ({"prompt": 150}, 3),  # prompts of two steps wait to be computed
        ({"prompt": 9_000}, 1),  # one is always let in
    ],
)
def test_an_owner_leaves_room_for_others(sizes: dict[str, int], most: int) -> None:
    roster = Roster(Capacity(rows=16, tokens=10_000, step_tokens=256))
    assert admitted(roster, "a", 40, **sizes) == most
    assert admitted(roster, "b", 40) >= 1
    assert max(roster.places().values()) == len(roster.places()) <= 79 - most


def test_room_is_given_back_and_the_owner_with_the_fewest_comes_first(make_manager: Any) -> None:
    manager, roster = make_manager([1, 2, 3]), Roster(Capacity(16, 10_000, 10_000))
    manager.start = False
    first = [request() for _ in range(20)]
    for one in first:
        roster.ask(one, "a")
    entered = [one for one in first if roster.may_enter(one)]
    roster.add(*manager.submit_requests(entered))
    second = [request() for _ in range(3)]
    for one in second:
        roster.ask(one, "b")
    assert [roster.may_enter(one) for one in second] == [True, False, False]
    for handle in manager.handles[:2]:
        handle.cancel()
    assert [roster.may_enter(one) for one in second] == [True, True, False]
    roster.forget(second[0])
    assert roster.may_enter(second[2])
    roster.reserve("table", "c", 4)
    assert not roster.may_enter(first[-1])
    roster.forget(*first)
    assert not set(roster.places()) & {one.request_id for one in first[14:]}
