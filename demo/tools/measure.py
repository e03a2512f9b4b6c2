"""Measures what the page claims, with the page's own means: ``python -m demo.tools.measure WHAT``.

together   the same chats at once and one after another, on one engine
overhead   the same load without a page and with a wall that is watched, in turn, on one engine
page       a page in a process of its own, driven through its API: a comparison of depth 1 and 2, and a wall

Where there is no package index (a GPU machine without a network), carry wheels: what ``gradio`` and ``datasets`` need
beyond torch and transformers, each fetched with ``pip download --no-deps`` for the other machine's Python, installed
with ``pip install --no-deps --no-index``; with ``--target``, into a folder called site-packages, since dill pickles
packages elsewhere by value, which pyarrow does not survive. With Gradio 6.31 these are: gradio, gradio-client,
hf-gradio, fastapi, starlette, uvicorn, httpx, httpcore, certifi, python-multipart, orjson, safehttpx, groovy,
semantic-version, tomlkit, brotli, pydub, pandas, python-dateutil, pytz, tzdata, pillow, opentelemetry-api; datasets,
dill, multiprocess, xxhash, pyarrow; and the packages that are missing there of those that transformers brings in
other versions: httpx and typer, with anyio, h11, click, rich, jinja2, markupsafe, pydantic. Then, for one H100::

    python -m demo.tools.measure page --model random:qwen3-0.6b --chats 64 --tokens 512
    python -m demo.tools.measure overhead --model random:qwen3-0.6b --chats 64 --tokens 512
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_async_batching.core.timeline import StepRecord

from ..page.style import launch_options
from ..serving.assets import asset
from ..serving.backend import STAGES, Backend
from ..serving.serving import Serving, load
from ..serving.settings import Settings
from ..wall.prompts import read_prompts
from ..wall.wall import Wall
from .browser import launch, press_section, set_numbers

_START_SECONDS = 900.0
_WATCH = """
import sys
from gradio_client import Client
client = Client(sys.argv[1], verbose=False)
for line in sys.stdin:
    chats, tokens = map(int, line.split())
    wall = {"chats": chats, "max_new_tokens": tokens, "turns": 1, "stagger": 0, "greedy": True}
    states = [*client.submit(**wall, api_name="/wall")]
    print(len(states), flush=True)
"""


def _run_wall(serving: Serving, prompts: Sequence[str], chats: int, tokens: int) -> Wall:
    """Answer prompts without a page: this thread sleeps until all of them have ended."""
    wall = Wall(serving, prompts, Settings(max_new_tokens=tokens, greedy=True), chats=chats)
    while not wall.over:
        wall.tick()
        for tile in wall.tiles:
            if tile.handle is not None:
                tile.handle.result()
    return wall


def _forget(serving: Serving) -> int:
    """Let nothing be found in the prefix cache; returns the number of the last step."""
    serving.manager.weights_updated()
    return serving.manager.stats().steps - 1


def _speed(records: Sequence[StepRecord]) -> float:
    """Tokens per second of the steps of a run, from the first one's planning to the last one's tokens."""
    return sum(record.tokens for record in records) / (records[-1].settle[1] - records[0].plan[0])


def together(serving: Serving, chats: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens/s of chats at once and one after another; the medians, and their ratio."""
    prompts = read_prompts(asset("prompts.txt"))
    speeds: dict[str, list[float]] = {"one_after_another": [], "together": []}
    per_cpu: dict[str, list[float]] = {"one_after_another": [], "together": []}
    for _ in range(repeats):
        _forget(serving)
        cpu = time.process_time()
        walls = [_run_wall(serving, [prompts[i % len(prompts)]], 1, tokens) for i in range(chats)]
        speeds["one_after_another"].append(sum(wall.tokens for wall in walls) / sum(wall.seconds for wall in walls))
        per_cpu["one_after_another"].append(sum(wall.tokens for wall in walls) / (time.process_time() - cpu))
        _forget(serving)
        cpu = time.process_time()
        wall = _run_wall(serving, prompts, chats, tokens)
        per_cpu["together"].append(wall.tokens / (time.process_time() - cpu))
        speeds["together"].append(wall.tokens / wall.seconds)
        print({name: [round(value, 1) for value in values] for name, values in speeds.items()}, file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "chats": chats,
        "max_new_tokens": tokens,
        "tokens_per_second": {name: round(value, 1) for name, value in medians.items()},
        "all": speeds,
        "ratio": round(medians["together"] / medians["one_after_another"], 2),
        # Other load on the machine does not count here.
        "tokens_per_cpu_second": {name: round(statistics.median(values), 1) for name, values in per_cpu.items()},
    }


def overhead(serving: Serving, chats: int, tokens: int, repeats: int, browser: bool) -> dict[str, Any]:
    """Tokens/s of the same load without a page and with one that is watched; the medians, and their ratio."""
    from ..app import build_app

    prompts, port = read_prompts(asset("prompts.txt")), _free_port()
    backend = Backend(serving)
    app = build_app(backend)
    app.launch(server_port=port, quiet=True, prevent_thread_lock=True, **launch_options())
    speeds: dict[str, list[float]] = {"without": [], "with": []}
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    frames: list[float] = []
    with (_in_browser if browser else _in_client)(f"http://127.0.0.1:{port}/") as watch:
        watch(chats, 8)
        for _ in range(repeats):
            before, cpu = _forget(serving), time.process_time()
            _run_wall(serving, prompts, chats, tokens)
            seconds["without"].append(time.process_time() - cpu)
            speeds["without"].append(_speed(serving.manager.timeline(after=before).steps))
            before, began, cpu = _forget(serving), time.perf_counter(), time.process_time()
            frames.append(watch(chats, tokens) / (time.perf_counter() - began))
            seconds["with"].append(time.process_time() - cpu)
            speeds["with"].append(_speed(serving.manager.timeline(after=before).steps))
            print({name: [round(value, 1) for value in values] for name, values in speeds.items()}, file=sys.stderr)
    app.close(verbose=False)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "watched_by": "browser" if browser else "client",
        "chats": chats,
        "max_new_tokens": tokens,
        "tokens_per_second": {name: round(value, 1) for name, value in medians.items()},
        "all": speeds,
        "frames_per_second": round(statistics.median(frames), 1),
        "percent": round(100 * medians["with"] / medians["without"], 1),
        # This process alone, engine and server together; other load on the machine does not count.
        "cpu_seconds": {name: round(statistics.median(values), 2) for name, values in seconds.items()},
    }


@contextmanager
def _in_client(url: str) -> Iterator[Any]:
    """A process that streams a wall; the function returns how many frames it got."""
    command = [sys.executable, "-c", _WATCH, url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def watch(chats: int, tokens: int) -> float:
            print(chats, tokens, file=process.stdin, flush=True)
            assert process.stdout is not None
            return float(process.stdout.readline())

        yield watch
        process.stdin.close()


@contextmanager
def _in_browser(url: str) -> Iterator[Any]:
    """A Chromium that draws a wall; the function returns how many frames it drew."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = launch(playwright)
        page = browser.new_page()
        page.goto(url)
        page.get_by_label("number input for Chats at once").wait_for()
        press_section(page, "Prompts and settings")
        page.get_by_label("Greedy").first.check()

        def watch(chats: int, tokens: int) -> float:
            set_numbers(
                page,
                {
                    "Questions per chat": 1,
                    "Max new tokens per answer": tokens,
                    "Seconds between two starts": 0,
                    "Chats at once": chats,
                },
            )
            page.evaluate(
                "document.querySelector('.wall').dataset.over = document.querySelector('.wall').dataset.frames = ''"
            )
            page.get_by_role("button", name=re.compile("^Start")).click()
            page.wait_for_function("document.querySelector('.wall').dataset.over === 'true'", timeout=1e6)
            page.get_by_role("button", name=re.compile("^Start")).wait_for()
            return float(page.evaluate("Number(document.querySelector('.wall').dataset.frames)"))

        yield watch
        browser.close()


def page(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures that a page shows of itself: loading, a comparison, a wall."""
    from gradio_client import Client

    port = _free_port()
    command = [sys.executable, "-m", __package__ + ".app", "--port", str(port)]
    for name in ("model", "device", "dtype", "depth"):
        if getattr(arguments, name) is not None:
            command += [f"--{name}", str(getattr(arguments, name))]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=Path(__file__).resolve().parents[2], stdout=subprocess.DEVNULL) as server:
        try:
            client = _connect(Client, f"http://127.0.0.1:{port}/", server)
            shown = time.perf_counter() - began
            while (stage := client.predict(api_name="/stats")["stage"])[0] <= STAGES:
                if stage[3] or server.poll() is not None:
                    raise SystemExit(f"the page did not come up: {stage[2]}")
                time.sleep(0.5)
            ready = time.perf_counter() - began
            compared = []
            for _ in range(arguments.repeats):
                states = client.submit(chats=arguments.chats, max_new_tokens=arguments.tokens, api_name="/compare")
                compared.append([*states][-1])
            asked = {"chats": arguments.chats, "max_new_tokens": arguments.tokens, "turns": 2, "stagger": 0}
            wall = [*client.submit(**asked, api_name="/wall")]
            stats = client.predict(api_name="/stats")
        finally:
            server.terminate()
    for comparison in compared:
        for outcome in comparison["outcomes"].values():
            del outcome["drawn"]
    return {
        "facts": stats["facts"],
        "page_shown_after_s": round(shown, 1),
        "all_compiled_after_s": round(ready, 1),
        "comparisons": compared,
        "wall": {key: value for key, value in wall[-1].items() if key != "conversations"} | {"frames": len(wall)},
    }


def _connect(client: Any, url: str, server: subprocess.Popen[bytes]) -> Any:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            return client(url, verbose=False)
        except Exception as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the page did not come up: {error}") from error
            time.sleep(0.3)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m demo.tools.measure", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("together", "overhead", "page"))
    parser.add_argument("--chats", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per answer at most (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--browser", action="store_true", help="overhead: a Chromium watches, on this machine too")
    parser.add_argument("--model", help="as for the page")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--depth", type=int)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    # As on the page.
    sys.setswitchinterval(0.001)
    if arguments.what == "page":
        result = page(arguments)
    else:
        named = {name: getattr(arguments, name) for name in ("model", "device", "dtype", "depth")}
        serving = load(lambda _, text: print(text, file=sys.stderr), **named)
        serving.manager.warmup()
        if arguments.what == "together":
            result = together(serving, arguments.chats, arguments.tokens, arguments.repeats)
        else:
            result = overhead(serving, arguments.chats, arguments.tokens, arguments.repeats, arguments.browser)
        result = {"facts": serving.facts(), **result}
        serving.manager.close()
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
