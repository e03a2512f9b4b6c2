"""One visitor attacks; a second one, who has another address, still gets the first word of an answer at once."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from support.demo import Served, wait_until_idle
from support.pace import slowed
from support.page_attacks import API, ATTACKS, Attacker, chats, events, from_address, sessions

import demo.page.sweeper

pytestmark = pytest.mark.timeout(180)

# What a visitor may wait for the first word on a machine that has nothing else to do.
SECONDS = 2.0
# A busy machine may be slower: by the time for the first word before the attack, which is 0.1 s on an idle one.
IDLE_SECONDS, MOST_SLACK = 0.1, 4.0
addresses = 0


@pytest.fixture(autouse=True)
def as_the_page(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make this process what the page's own is, with addresses that no test before has used."""
    monkeypatch.setattr(demo.page.sweeper, "UNREAD_SECONDS", 3.0)
    global addresses
    addresses += 1
    usual = sys.getswitchinterval()
    sys.setswitchinterval(0.001)
    yield
    sys.setswitchinterval(usual)


@pytest.fixture
def attacker(served: Served) -> Iterator[Attacker]:
    made = Attacker(served.url, addresses)
    yield made
    made.pool.shutdown()
    made.http.close()
    wait_until_idle(served.serving, 30)


def visitor() -> dict[str, str]:
    return from_address("198.51.100", addresses)


@contextmanager
def attacking(name: str, url: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that attacks from now on."""
    command = [sys.executable, "-m", "support.page_attacks", name, url, str(folder), str(addresses)]
    tests = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=tests, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        try:
            yield process
        finally:
            process.kill()


def first_word(url: str) -> float:
    """Seconds from a question to the first word of its answer."""
    with httpx.Client(base_url=url + API, headers=visitor(), timeout=60) as http:
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


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_second_visitor_is_answered_at_once(
    served: Served, attack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A page that stands still does so each time; a machine that does something else in one of the tests does not.
    tried = []
    for _ in range(2):
        waited, allowed = latencies(served, attack, tmp_path, capsys)
        tried.append((waited, allowed))
        wait_until_idle(served.serving, 30)
        # One of the four may meet what else the machine does; a page that stands still would show in all of them.
        if sorted(waited)[-2] <= allowed and max(waited) <= 3 * allowed:
            return
    raise AssertionError(f"seconds to the first word, and how many are allowed: {tried}")


def latencies(
    served: Served, attack: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[list[float], float]:
    """Seconds to four first words of a second visitor, the last one after the attack; how many are allowed."""
    alone = sorted(first_word(served.url) for _ in range(3))[1]
    with attacking(attack, served.url, folder) as process:
        time.sleep(0.3)
        waited = [first_word(served.url) for _ in range(3)]
        statuses, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    waited.append(first_word(served.url))
    with capsys.disabled():
        times = ", ".join(f"{second:.2f}" for second in waited)
        print(f"\n  first word alone {alone:.2f} s, beside {attack} {times} s; statuses {statuses.strip()}")
    return waited, SECONDS * min(MOST_SLACK, max(1.0, alone / IDLE_SECONDS))


def test_what_is_too_much_is_refused_by_name(attacker: Attacker) -> None:
    said = attacker.outcome(attacker.call("wall", 64, None, 1, 1024, 1e9, True))
    assert "`stagger` must be a number from 0.0 to 5.0, got 1000000000.0" in said
    chats(attacker, Path())
    assert attacker.statuses.count(429) >= 20
    assert "from your address" in attacker.call("chat", "Hi").text
    assert (
        httpx.post(attacker.http.base_url.join("call/stats"), json={"data": []}, headers=visitor()).status_code == 200
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
        headers=visitor(),
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
        with httpx.Client(base_url=served.url + API, headers=visitor(), timeout=60) as http:
            began = time.perf_counter()
            started = http.post("call/wall", json={"data": [2, ["Hi"], 1, 8, 0.0, True]})
            with http.stream("GET", f"call/wall/{started.json()['event_id']}") as stream:
                text = "".join(stream.iter_lines())
            waited = time.perf_counter() - began
        wait_until_idle(served.serving, 20)
    assert "conversations" in text
    assert "place" not in text, "one address never takes the last place"
    assert waited < 10
