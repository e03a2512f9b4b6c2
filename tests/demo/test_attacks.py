"""One visitor attacks; a second one, who has another address, still gets the first word of an answer at once."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.demo import Served, wait_until_idle
from support.pace import slowed

import demo.page.sweeper

pytestmark = pytest.mark.timeout(180)

# What a visitor may wait for the first word on a machine that has nothing else to do; the attackers of these tests run
# in the server's own process and take its time as well.
SECONDS = 2.0
# A busy machine may be slower: by the time for the first word before the attack, which is 0.1 s on an idle one.
IDLE_SECONDS, MOST_SLACK = 0.1, 4.0
addresses = 0
API = "gradio_api/"
RUNS = "".join("`" * length + " " for length in range(1, 199))


def from_address(network: str) -> dict[str, str]:
    """The server believes this where the connection comes from its own machine."""
    return {"X-Forwarded-For": f"{network}.{addresses}"}


class Attacker:
    """Sends what a client of the page would not."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=64)
        self.http = httpx.Client(base_url=url + API, headers=from_address("203.0.113"), timeout=60, limits=limits)
        self.statuses: list[int] = []
        self.pool = ThreadPoolExecutor(8)
        config = httpx.get(url + "config").json()
        self.functions = {d["api_name"]: d["id"] for d in config["dependencies"]}
        self.panel = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == "panel")

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        try:
            answer = self.http.post(path, json=body, **more)
        except httpx.TransportError:  # a refusal ends the connection while the body is still being sent
            answer = httpx.Response(413)
        self.statuses.append(answer.status_code)
        return answer

    def call(self, name: str, *data: Any) -> httpx.Response:
        """Start a run, and never read a word of it."""
        return self.post(f"call/{name}", {"data": list(data)})

    def press(self, name: str, *data: Any, session: str = "attacker") -> httpx.Response:
        """Fire an event of the page, past its widgets."""
        return self.post("queue/join", {"data": list(data), "fn_index": self.functions[name], "session_hash": session})

    def upload(self, name: str, content: bytes) -> Any:
        answer = self.http.post("upload", files={"files": (name, content)})
        self.statuses.append(answer.status_code)
        return answer.json()

    def outcome(self, started: httpx.Response) -> str:
        """Read a run to its end, and return the last message."""
        text = self.http.get(f"call/x/{started.json()['event_id']}").text
        return text.strip().splitlines()[-1]

    def many(self, number: int, act: Callable[[int], object]) -> None:
        """Act many times, eight at a time."""
        list(self.pool.map(act, range(number)))


@pytest.fixture
def attacker(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attacker]:
    monkeypatch.setattr(demo.page.sweeper, "UNREAD_SECONDS", 3.0)
    global addresses
    addresses += 1  # what one test has used up is not missing in the next
    made, usual = Attacker(served.url), sys.getswitchinterval()
    sys.setswitchinterval(0.001)  # as the page's own process does
    yield made
    sys.setswitchinterval(usual)
    made.pool.shutdown()
    made.http.close()
    wait_until_idle(served.serving, 30)


def first_word(url: str) -> float:
    """Seconds from a question to the first word of its answer."""
    with httpx.Client(base_url=url + API, headers=from_address("198.51.100"), timeout=60) as http:
        began = time.perf_counter()
        asked = http.post("call/chat", json={"data": ["Hi", None, "", 24, 0.7, 0.9, 0, True, None]})
        assert asked.status_code == 200, asked.text
        with http.stream("GET", f"call/chat/{asked.json()['event_id']}") as stream:
            lines = stream.iter_lines()
            for line in lines:
                assert not line.startswith("event: error"), next(lines)
                if line.startswith(("event: generating", "event: complete")):
                    return time.perf_counter() - began
    raise AssertionError("no answer")


def backquotes(attacker: Attacker, folder: Path) -> None:
    history = [{"role": ("user", "assistant")[i % 2], "content": RUNS} for i in range(200)]
    for number in range(8):
        attacker.press("submit", RUNS, history, "", 64, 0.7, 0.9, 0, True, None, session=f"attacker-{number}")


def newlines(attacker: Attacker, folder: Path) -> None:
    history = [{"role": ("user", "assistant")[i % 2], "content": "a\n" * 9_000} for i in range(200)]
    for number in range(8):
        attacker.press("submit", "\n\ta" * 5_000, history, "", 64, 0.7, 0.9, 0, True, None, session=f"news-{number}")


def tables(attacker: Attacker, folder: Path) -> None:
    path = folder / "bomb.parquet"
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), ["x" * 200_000])
    pq.write_table(pa.table({"prompt": texts, "list": [["y" * 20_000] * 500] * 64 + [[]] * 1936}), path)
    uploaded = attacker.upload("bomb.parquet", path.read_bytes())[0]
    file = {"path": uploaded, "meta": {"_type": "gradio.FileData"}}
    attacker.many(16, lambda i: attacker.press("on_table", "", file, session=f"attacker-{i}"))


def walls(attacker: Attacker, folder: Path) -> None:
    attacker.many(8, lambda _: attacker.call("wall", 64, None, 4, 1024, 0.0, True))


def staggered(attacker: Attacker, folder: Path) -> None:
    attacker.many(4, lambda _: attacker.call("wall", 64, None, 1, 1024, 1e9, True))


def datasets(attacker: Attacker, folder: Path) -> None:
    rows = [{"ask": f"{i}?"} for i in range(2000)]
    attacker.many(12, lambda _: attacker.call("dataset", rows, "ask", "", 1024, True))


def chats(attacker: Attacker, folder: Path) -> None:
    attacker.many(100, lambda i: attacker.call("chat", f"{i}?", None, "", 1024, 0.7, 0.9, 0, False, None))


def long_prompts(attacker: Attacker, folder: Path) -> None:
    text = " ".join(str(i) for i in range(4_000))
    attacker.many(40, lambda i: attacker.call("chat", f"{i} {text}"[:900], None, "", 64, 0.7, 0.9, 0, True, None))


def long_histories(attacker: Attacker, folder: Path) -> None:
    history = [{"role": ("user", "assistant")[i % 2], "content": "word " * 3_000} for i in range(200)]
    attacker.many(24, lambda _: attacker.call("chat", "Hi", history))


def uploads(attacker: Attacker, folder: Path) -> None:
    attacker.many(24, lambda i: attacker.upload(f"{i}.csv", b"%d" % i * 2_000_000))


def bodies(attacker: Attacker, folder: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    for _ in range(4):
        attacker.post("call/chat", {"data": ["x" * (50 << 20)]})
        attacker.statuses.append(attacker.http.post("call/chat", content='{"data":' + deep + "}").status_code)


def sessions(attacker: Attacker, folder: Path) -> None:
    def open_one(number: int) -> None:
        body = {"data": None, "component_id": attacker.panel, "fn_name": "pulse", "session_hash": f"s{number}"}
        attacker.post("component_server", body)

    attacker.many(400, open_one)


def events(attacker: Attacker, folder: Path) -> None:
    attacker.many(300, lambda i: attacker.press("clear", session=f"event-{i}"))


def traces(attacker: Attacker, folder: Path) -> None:
    attacker.many(40, lambda _: attacker.call("trace"))


def cancels(attacker: Attacker, folder: Path) -> None:
    def storm(number: int) -> None:
        started = attacker.call("chat", "Hi", None, "", 1024, 0.7, 0.9, 0, True, None)
        event = started.json().get("event_id", "x")
        attacker.post("cancel", {"session_hash": event, "fn_index": 0, "event_id": event})

    attacker.many(80, storm)


ATTACKS = (
    *(backquotes, newlines, tables, walls, staggered, datasets, chats, long_prompts, long_histories, uploads),
    *(bodies, sessions, events, traces, cancels),
)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_second_visitor_is_answered_at_once(
    served: Served, attacker: Attacker, attack: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = sorted(first_word(served.url) for _ in range(3))[1]
    attacking = threading.Thread(target=attack, args=(attacker, tmp_path))
    attacking.start()
    time.sleep(0.3)
    waited = [first_word(served.url) for _ in range(3)]
    attacking.join()
    waited.append(first_word(served.url))
    with capsys.disabled():
        name = attack.__name__.replace("_", " ")
        print(f"\n  first word alone {alone:.2f} s, beside {name} {', '.join(f'{second:.2f}' for second in waited)} s")
    allowed = SECONDS * min(MOST_SLACK, max(1.0, alone / IDLE_SECONDS))
    # One of the four may meet what else the machine does; a page that stands still would show in all of them.
    assert sorted(waited)[-2] <= allowed
    assert max(waited) <= 3 * allowed


def test_what_is_too_much_is_refused_by_name(attacker: Attacker) -> None:
    said = attacker.outcome(attacker.call("wall", 64, None, 1, 1024, 1e9, True))
    assert "`stagger` must be a number from 0.0 to 5.0, got 1000000000.0" in said
    chats(attacker, Path())
    assert attacker.statuses.count(429) >= 20
    assert "from your address" in attacker.call("chat", "Hi").text
    assert (
        httpx.post(
            attacker.http.base_url.join("call/stats"), json={"data": []}, headers=from_address("198.51.100")
        ).status_code
        == 200
    )


def test_runs_that_end_at_once_are_bounded_by_their_number_in_a_second(attacker: Attacker) -> None:
    events(attacker, Path())
    assert attacker.statuses.count(200) >= 64
    assert attacker.statuses.count(429) > 100


def test_bodies_and_files_are_bounded(attacker: Attacker) -> None:
    assert attacker.post("call/chat", {"data": ["x" * (5 << 20)]}).status_code == 413

    def chunks() -> Iterator[bytes]:
        yield from [b"x" * (1 << 20)] * 6

    with suppress(httpx.TransportError):  # of no known length
        assert attacker.http.post("call/chat", content=chunks()).status_code in (400, 413)
    attacker.many(120, lambda i: attacker.upload(f"{i}.csv", b"%d" % i * 1_000_000))
    assert 429 in attacker.statuses
    answer = httpx.post(
        attacker.http.base_url.join("upload"),
        files={"files": ("a.csv", b"a\n")},
        headers=from_address("198.51.100"),
        timeout=60,
    )
    assert answer.status_code == 200, "another visitor may send files"


def test_sessions_are_bounded(served: Served, attacker: Attacker) -> None:
    sessions(attacker, Path())
    assert 429 in attacker.statuses
    form = attacker.http.post("component_server", files={"session_hash": ("x", b"x")})
    assert form.status_code == 400


@pytest.mark.parametrize("path", ["deep_link?session_hash=a", "file=http://127.0.0.1:1/", "proxy=http://a.hf.space/"])
def test_what_the_page_does_not_use_is_closed(served: Served, path: str) -> None:
    assert httpx.get(served.url + API + path).status_code == 404


def test_a_file_outside_of_the_uploads_is_not_read(attacker: Attacker, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("prompt\nsecret\n")
    file = {"path": str(tmp_path / "secret.csv"), "meta": {"_type": "gradio.FileData"}}
    attacker.press("on_table", "", file)
    told = ""
    with attacker.http.stream("GET", "queue/data", params={"session_hash": "attacker"}) as stream:
        for line in stream.iter_lines():
            told += line
    assert "process_completed" in told
    assert "secret</li>" not in told
    assert '"success":false' in told


def test_what_is_not_read_gives_its_place_back(served: Served, attacker: Attacker) -> None:
    # So slow that no wall would end by itself in time.
    with slowed(served.serving.manager, 0.03):
        for _ in range(4):
            attacker.call("wall", 4, ["Hi"], 4, 1024, 5.0, True)
        with httpx.Client(base_url=served.url + API, headers=from_address("198.51.100"), timeout=60) as http:
            began = time.perf_counter()
            started = http.post("call/wall", json={"data": [2, ["Hi"], 1, 8, 0.0, True]})
            with http.stream("GET", f"call/wall/{started.json()['event_id']}") as stream:
                text = "".join(stream.iter_lines())
            waited = time.perf_counter() - began
        wait_until_idle(served.serving, 20)
    assert "conversations" in text
    assert "place" not in text, "one address never takes the last place"
    assert waited < 10
