"""The page's API through `gradio_client`, on a real server around a tiny model."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from support.demo import Served, wait_until_idle
from support.pace import slowed

from demo.page.endpoints import _TRACED_STEPS

CLIENTS = 20  # more than the rows of the engine


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return Client(served.url, verbose=False)


def test_every_action_has_a_name_types_and_a_text(client: Any) -> None:
    described = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(described) == {"/chat", "/wall", "/compare", "/dataset", "/stats", "/trace"}
    for name, endpoint in described.items():
        assert len(endpoint["description"]) > 40, name
        assert all(parameter["python_type"]["type"] for parameter in endpoint["parameters"]), name
    assert [parameter["parameter_name"] for parameter in described["/chat"]["parameters"]][:3] == [
        "message",
        "history",
        "system",
    ]


def test_the_api_starts_the_same_wall_as_the_page(client: Any) -> None:
    described = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/wall"]["parameters"]
    asked = {parameter["parameter_name"]: parameter["parameter_default"] for parameter in described}
    controls = {component["props"].get("label"): component["props"] for component in client.config["components"]}
    labels = {
        "chats": "Chats at once",
        "turns": "Questions per chat",
        "max_new_tokens": "Max new tokens per answer",
        "stagger": "Seconds between two starts",
    }
    assert {name: asked[name] for name in labels} == {name: controls[label]["value"] for name, label in labels.items()}
    assert set(asked) == {*labels, "greedy", "prompts"}


def test_many_clients_stream_at_once(served: Served) -> None:
    together = threading.Barrier(CLIENTS)

    def chat(number: int) -> list[str]:
        one = Client(served.url, verbose=False)
        together.wait(120)
        job = one.submit(f"Question {number}", max_new_tokens=100, greedy=True, api_name="/chat")
        return [*job]

    busiest = 0
    with slowed(served.serving.manager), ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(chat, number) for number in range(CLIENTS)]
        while not all(answer.done() for answer in answers):
            stats = served.serving.manager.stats()
            busiest = max(busiest, stats.running + stats.waiting)
            time.sleep(0.02)
        streams = [answer.result() for answer in answers]
    for stream in streams:
        assert len(stream) > 1, "an answer comes in parts"
        assert all(after.startswith(before) for before, after in pairwise(stream))
    assert len({stream[-1] for stream in streams}) > CLIENTS / 2, "no client gets the answer of another"
    assert busiest > 4, "they were in one batch"
    wait_until_idle(served.serving)


def test_the_same_question_and_seed_is_the_same_answer(client: Any) -> None:
    ask: dict[str, Any] = {"message": "Hi", "max_new_tokens": 20, "seed": 7, "api_name": "/chat"}
    assert client.predict(**ask) == client.predict(**ask)
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert client.predict(**ask, history=earlier) != client.predict(**ask)


def test_a_cancelled_job_frees_its_row(client: Any, served: Served) -> None:
    with slowed(served.serving.manager):
        job = client.submit("A long story, please.", max_new_tokens=1000, greedy=True, api_name="/chat")
        deadline = time.monotonic() + 60
        while not (job.outputs() and served.serving.manager.stats().running == 1):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        job.cancel()
    wait_until_idle(served.serving)


def test_a_client_that_vanishes_frees_its_row(served: Served) -> None:
    script = f"""
        from gradio_client import Client
        job = Client({served.url!r}, verbose=False).submit("Hi", max_new_tokens=1024, greedy=True, api_name="/chat")
        next(iter(job))
        print("streaming", flush=True)
        import os
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert "streaming" in done.stdout, done.stderr
    wait_until_idle(served.serving)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"message": "  "}, "`message` is empty"),
        ({"message": "Hi", "max_new_tokens": 0}, "`max_new_tokens` must be a number from 1 to 1024, got 0"),
        ({"message": "Hi", "temperature": -1}, "`temperature` must be"),
        ({"message": "Hi", "top_p": "high"}, "`top_p` must be"),
        ({"message": "x" * 19_000}, "too long"),
        ({"message": "Hi", "seed": 10**30}, "`seed` must be a number"),
        ({"message": "Hi", "system": ["x"]}, "`system` must be a text"),
        ({"message": "Hi", "history": "x"}, "`history` must be a list"),
        ({"message": ["x"]}, "`message` is empty"),
        ({"chats": 1.5, "api_name": "/wall"}, "`chats` must be a whole number from 1 to 64, got 1.5"),
        ({"turns": "many", "api_name": "/wall"}, "`turns` must be a number from 1 to 4, got 'many'"),
        ({"stagger": 1e9, "api_name": "/wall"}, "`stagger` must be a number from 0.0 to 5.0"),
        ({"stagger": -1, "api_name": "/wall"}, "`stagger` must be"),
        ({"prompts": "x", "api_name": "/wall"}, "`prompts` must be a list of texts"),
        (
            {"max_new_tokens": [8], "api_name": "/compare"},
            "`max_new_tokens` must be a number .*, got a list",
        ),
        ({"depths": [[1]], "api_name": "/compare"}, "`depths` must be of 1 and 2"),
        ({"rows": [{"a": "x"}], "column": ["a"], "api_name": "/dataset"}, "`column` must name a key"),
        ({"chats": 65, "api_name": "/wall"}, "`chats` must be a number from 1 to 64, got 65"),
        ({"prompts": [], "api_name": "/wall"}, "no prompt"),
        ({"depths": [3], "api_name": "/compare"}, "`depths` must be of 1 and 2"),
        ({"rows": [], "column": "a", "api_name": "/dataset"}, "`rows` must be"),
        ({"rows": [{"a": 1}], "column": "a", "api_name": "/dataset"}, "`column` must name a key that holds text"),
    ],
)
def test_bad_input_is_told_to_its_caller(client: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(AppError, match=words):
        client.predict(**{"api_name": "/chat", **arguments})


def test_a_wall(client: Any, served: Served) -> None:
    with slowed(served.serving.manager, 0.02):
        job = client.submit(chats=40, prompts=["One?", "Two?"], turns=2, max_new_tokens=30, api_name="/wall")
        states = [*job]
    assert states[0]["chats"] == 40
    assert max(state["running"] for state in states) > 8
    last = states[-1]
    assert last["done"] == 40
    assert 2250 < last["tokens"] <= 40 * 2 * 30, "now and then a word means the end"
    assert [len(conversation) for conversation in last["conversations"]] == [2] * 40
    assert last["conversations"][1][0][0] == "Two?"
    assert all(answer for conversation in last["conversations"] for _, answer in conversation)
    wait_until_idle(served.serving)


def test_a_comparison(client: Any, served: Served) -> None:
    states = [*client.submit(chats=4, max_new_tokens=16, api_name="/compare")]
    assert states[-1]["over"]
    assert states[-1]["same"] == 4
    assert set(states[-1]["outcomes"]) == {"1", "2"}
    assert served.serving.manager.stats().depth == served.serving.depth


def test_a_dataset(client: Any) -> None:
    rows = [{"id": i, "ask": f"{i}?"} for i in range(20)]
    states = [*client.submit(rows, "ask", max_new_tokens=5, api_name="/dataset")]
    completed = states[-1]["completed"]
    assert [row["id"] for row in completed] == list(range(20))
    assert all(row["completion"] and not row["error"] for row in completed)


def test_figures_and_trace(client: Any, served: Served) -> None:
    while len(served.serving.manager.timeline().steps) < 1.5 * _TRACED_STEPS:
        client.predict("Hi", max_new_tokens=200, api_name="/chat")
    stats = client.predict(api_name="/stats")
    assert stats["figures"]["pages_total"] == 384
    events = client.predict(api_name="/trace")["traceEvents"]
    assert {event["name"].split()[0] for event in events if event["ph"] == "X"} >= {"decode", "plan", "settle"}
    plans = [event for event in events if event["ph"] == "X" and event["name"].split()[0] == "plan"]
    assert len(plans) == _TRACED_STEPS, "Gradio walks through all of it in the event loop"
