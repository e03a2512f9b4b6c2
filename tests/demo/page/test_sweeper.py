"""What visitors leave behind is cleared away."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import demo.page.sweeper
from demo.page.sweeper import Sweeper, delete_oldest
from demo.serving.visitor import address_of


class FakeQueue:
    def __init__(self) -> None:
        self.pending_messages_per_session: Any = _Sessions()
        self.pending_event_ids_session: dict[str, set[str]] = {}
        self.event_ids_to_events: dict[str, Any] = {}
        self.cleaned: list[str] = []

    async def clean_events(self, session_hash: str) -> None:
        self.cleaned.append(session_hash)

    def open(self, session: str, event: bool) -> Any:
        self.pending_messages_per_session[session] = asyncio.Queue()
        self.pending_event_ids_session[session] = {session}
        if event:
            self.event_ids_to_events[session] = SimpleNamespace(session_hash=session, fn=SimpleNamespace(_id=0))
        return self.pending_messages_per_session[session]


class _Sessions(dict[str, Any]):
    max_size = 0


def test_what_is_not_read_is_ended_and_what_is_over_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(demo.page.sweeper, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    queue = FakeQueue()
    sweeper = Sweeper(SimpleNamespace(get_blocks=lambda: SimpleNamespace(_queue=queue)))

    async def run() -> None:
        read, unread, over, quiet = (queue.open(name, name != "over") for name in ("read", "unread", "over", "quiet"))
        del over, quiet
        for _ in range(40):
            now[0] += 1
            for messages in (read, unread):
                messages.put_nowait(object())
            if read.qsize() > 5:
                read.get_nowait()
            await sweeper.sweep()

    asyncio.run(run())
    assert queue.cleaned == ["unread"]
    assert set(queue.pending_messages_per_session) == {"read", "quiet"}
    assert set(queue.pending_event_ids_session) == {"read", "quiet"}
    assert set(sweeper._oldest) == {"read", "quiet"}


def test_old_files_go_and_the_oldest_beyond_the_bound(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "a.csv").write_bytes(b"x" * 100)
        time.sleep(0.02)
    delete_oldest(tmp_path, 300, 3600)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "4"]
    delete_oldest(tmp_path, 300, -1)
    assert not list(tmp_path.iterdir())
    delete_oldest(tmp_path / "absent", 300, 3600)


def test_the_page_s_files_are_in_a_folder_of_its_own() -> None:
    assert os.environ["GRADIO_TEMP_DIR"]
    assert demo.page.sweeper.own_files() == (os.environ["GRADIO_TEMP_DIR"] == str(demo.page.sweeper.FILES))


@pytest.mark.parametrize(
    ("space", "forwarded", "address"),
    [
        (False, "8.8.8.8", "10.0.0.1"),
        (True, "1.1.1.1, 8.8.8.8", "8.8.8.8"),
        (True, "8.8.8.8, 10.1.2.3", "8.8.8.8"),
        (True, "nonsense", "10.0.0.1"),
        (True, "", "10.0.0.1"),
    ],
)
def test_a_visitor_s_address_is_what_the_nearest_proxy_saw(
    monkeypatch: pytest.MonkeyPatch, space: bool, forwarded: str, address: str
) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    if space:
        monkeypatch.setenv("SPACE_ID", "a/b")
    assert address_of("10.0.0.1", [forwarded]) == address
