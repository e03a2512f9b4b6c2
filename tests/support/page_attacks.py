"""What a client of the page would not send: `python -m support.page_attacks NAME URL FOLDER NUMBER`.

As a process of its own an attacker takes no time of the server's interpreter, as on a visitor's own machine. It says
`ready`, begins when a line comes in, and prints how often each status came back.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq

API = "gradio_api/"
RUNS = "".join("`" * length + " " for length in range(1, 199))


def from_address(network: str, number: int) -> dict[str, str]:
    """The server believes this where the connection comes from its own machine."""
    return {"X-Forwarded-For": f"{network}.{number}"}


class Attacker:
    """One address, and what it sends.

    Args:
        url: The page's.
        number: The last byte of the address.
    """

    def __init__(self, url: str, number: int) -> None:
        limits = httpx.Limits(max_connections=64)
        self.http = httpx.Client(
            base_url=url + API, headers=from_address("203.0.113", number), timeout=60, limits=limits
        )
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


def races(attacker: Attacker, folder: Path) -> None:
    attacker.many(12, lambda i: attacker.press("on_race", 16, 128, session=f"race-{i}"))


def cancels(attacker: Attacker, folder: Path) -> None:
    def storm(number: int) -> None:
        started = attacker.call("chat", "Hi", None, "", 1024, 0.7, 0.9, 0, True, None)
        event = started.json().get("event_id", "x")
        attacker.post("cancel", {"session_hash": event, "fn_index": 0, "event_id": event})

    attacker.many(80, storm)


ATTACKS: dict[str, Callable[[Attacker, Path], None]] = {
    attack.__name__: attack
    for attack in (
        *(backquotes, newlines, tables, walls, staggered, datasets, chats, long_prompts, long_histories, uploads),
        *(bodies, sessions, events, traces, cancels, races),
    )
}


def main(name: str, url: str, folder: str, number: str) -> None:
    """Attack once, when told to."""
    attacker = Attacker(url, int(number))
    print("ready", flush=True)
    sys.stdin.readline()
    ATTACKS[name](attacker, Path(folder))
    attacker.pool.shutdown()
    print(json.dumps(Counter(attacker.statuses)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
