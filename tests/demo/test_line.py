"""Who may run next."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from demo.line import Line, LineFullError
from demo.roster import Roster


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
    from demo.settings import Settings

    manager, roster = make_manager([1, 2, 3]), Roster()
    manager.start = False
    handles = [manager.submit_request(Settings().request([1], ())) for _ in range(4)]
    roster.add(*handles)
    assert roster.places() == {handle.request_id: place for place, handle in enumerate(handles, 1)}
    handles[0].started = True
    handles[2].cancel()
    assert roster.places() == {handles[1].request_id: 1, handles[3].request_id: 2}
