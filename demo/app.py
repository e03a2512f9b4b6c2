"""The demo page: many chats at once on one engine, your own among them, and the engine's live figures.

Run it with ``python -m demo.app`` or ``python demo/app.py``; on a Space, this folder is the root.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from transformers.utils import logging as transformers_logging

if not __package__:
    # A module that is run as a file has no package (PEP 366): make its folder the package, under the folder's name.
    _folder = Path(__file__).resolve().parent
    sys.path.insert(0, str(_folder.parent))
    __package__ = _folder.name
    importlib.import_module(__package__)

from .arguments import make_parser, port_problem
from .chat.handlers import ChatHandlers
from .chat.service import ChatService
from .compare.handlers import CompareRuns
from .dataset.handlers import DatasetRuns
from .page.endpoints import add_endpoints
from .page.layout import chat_parts, compare_parts, dataset_parts, wall_parts
from .page.style import FOCUS_JS, TITLE, WALL_IDLE_JS, launch_options
from .page.sweeper import FILE_SECONDS
from .serving.assets import asset
from .serving.backend import Backend
from .serving.line import Line
from .serving.models import load_chat_model
from .serving.pools import TRACES
from .serving.pulse import Pulse
from .serving.serving import load
from .serving.visitor import visitor_of
from .wall.handlers import WallRuns
from .wall.prompts import read_prompts
from .wall.zero_gpu import ZeroGpu, gpu_decorator

# Chat streams that run at once, and the length of Gradio's own queue, where further streams wait for a place.
CONCURRENT_CHATS = 128
_QUEUE_SIZE = 512
_QUEUE_LOOK_SECONDS = 0.02
_WALLS, _WAITING_WALLS = 4, 16
_WAITING_COMPARISONS = 8
_HISTORY_KEY, _JOB_KEY = "hf_async_batching.chat", "hf_async_batching.job"


def build_app(backend: Backend) -> gr.Blocks:
    """Build the page. Launch it with ``app.launch(**launch_options())``: Gradio takes the theme there."""
    service = ChatService(backend)
    handlers = ChatHandlers(service)
    walls = WallRuns(backend, Line(_WALLS, _WAITING_WALLS, running_each=_WALLS - 1, waiting_each=_WAITING_WALLS // 2))
    meter = Pulse(backend)
    datasets = DatasetRuns(backend)
    prompts = asset("prompts.txt")
    line = Line(1, _WAITING_COMPARISONS, waiting_each=_WAITING_COMPARISONS // 2)
    comparisons = CompareRuns(backend, line, read_prompts(prompts))

    async def pulse(since: float | None) -> dict[str, Any]:
        return meter.read(float("-inf") if since is None else float(since))

    async def trace(_: None) -> str:
        return await TRACES.run(lambda: json.dumps(backend.require().manager.timeline().to_chrome_trace()))

    async def whole(run: str) -> dict[str, Any]:
        return walls.whole(str(run))

    async def stop_one(what: Sequence[Any]) -> None:
        walls.stop_one(str(what[0]), int(what[1]))

    def leave(request: gr.Request) -> None:
        handlers.leave(request)
        walls.leave(visitor_of(request))
        comparisons.stop(visitor_of(request))
        datasets.stop(visitor_of(request))

    app = gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(300, int(FILE_SECONDS)))
    with app:
        # The browser keeps these, and a reload shows the conversation again. The key only hides them from a glance.
        history = gr.BrowserState([], storage_key=_HISTORY_KEY, secret=_HISTORY_KEY)
        job = gr.BrowserState(None, storage_key=_JOB_KEY, secret=_JOB_KEY)
        gr.HTML(
            value="",
            html_template=asset("hero.html"),
            js_on_load="hfab.hero(element.querySelector('.hero'))",
            apply_default_css=False,
            elem_id="top",
        )
        with gr.Row(equal_height=False, elem_id="columns"):
            with gr.Column(scale=8, min_width=320), gr.Tabs(overflow_behavior="wrap", elem_id="tabs"):
                with gr.Tab("Race"):
                    compare = compare_parts()
                with gr.Tab("Chat wall", elem_id="wall-tab"):
                    wall = wall_parts(prompts, [whole, stop_one])
                with gr.Tab("Dataset"):
                    dataset = dataset_parts()
                # On a phone this tab shows the chat's column. On wider screens the column stands beside the tabs.
                gr.Tab("Your chat", elem_id="chat-tab")
            with gr.Column(scale=5, min_width=320, elem_id="mine"):
                chat = chat_parts()
        gr.HTML(
            value="",
            html_template=asset("panel.html"),
            js_on_load="hfab.panel(element.querySelector('.panel'), server)",
            apply_default_css=False,
            server_functions=[pulse, trace],
            elem_id="panel",
        )

        # Every event of the chat goes through the queue. Only the queue delivers results in the order in which they
        # were made, so no part of a cancelled answer arrives after the page was cleared.
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        chatty = quiet | {"concurrency_limit": CONCURRENT_CHATS, "concurrency_id": "chats"}
        page = [history, chat.chatbot, chat.box, chat.note, chat.send, chat.stop]
        asked = [history, *chat.knobs]
        gr.on([chat.box.submit, chat.send.click], handlers.submit, [chat.box, *asked], page, **chatty)
        chat.chatbot.example_select(handlers.example, asked, page, **chatty)
        chat.chatbot.retry(handlers.retry, asked, page, **chatty)
        chat.chatbot.edit(handlers.edit, asked, page, **chatty)
        chat.chatbot.undo(handlers.undo, [history], page, **quiet)
        chat.chatbot.clear(handlers.clear, None, page, **quiet)
        chat.stop.click(handlers.stop, None, None, queue=False, **quiet)

        wall_page = [wall.wall, wall.start, wall.stop, wall.add]
        wall.start.click(walls.on_start, wall.knobs, wall_page, **quiet)
        wall.stop.click(walls.on_stop, None, None, queue=False, **quiet)
        # The page itself ends a wall that the server has forgotten.
        wall.wall.stop(None, None, wall_page[1:], js=WALL_IDLE_JS, api_visibility="private")
        wall.add.click(walls.on_add, None, None, queue=False, **quiet)

        compare_page = [compare.view, compare.run, compare.stop]
        compare.run.click(comparisons.on_race, [compare.chats, compare.longest], compare_page, **quiet)
        compare.stop.click(comparisons.on_stop, None, None, queue=False, **quiet)

        table = [dataset.source, dataset.file]
        dataset_page = [job, dataset.progress, dataset.run, dataset.stop, dataset.resume]
        dataset_page += [dataset.download, dataset.rows]
        looked = [dataset.source.change, dataset.file.upload, dataset.file.clear]
        gr.on(looked, datasets.on_table, table, [dataset.column, dataset.about], **quiet)
        dataset.column.input(datasets.on_column, [*table, dataset.column], dataset.about, **quiet)
        dataset.run.click(datasets.on_run, dataset.knobs, dataset_page, **quiet)
        dataset.resume.click(datasets.on_resume, job, dataset_page, **quiet)
        dataset.stop.click(datasets.on_stop, None, None, queue=False, **quiet)

        app.load(datasets.on_load, job, dataset_page, **quiet)
        app.load(handlers.restore, history, chat.chatbot, **quiet)
        app.load(None, None, None, js=FOCUS_JS, api_visibility="private")
        app.unload(leave)
        add_endpoints(backend, service, walls, comparisons, datasets, meter, read_prompts(prompts))
    app.queue(default_concurrency_limit=CONCURRENT_CHATS, max_size=_QUEUE_SIZE)
    # By default Gradio looks for events a thousand times a second; each look takes the interpreter from the engine.
    app._queue.sleep_when_free = _QUEUE_LOOK_SECONDS
    app._queue.progress_update_sleep_when_free = _QUEUE_LOOK_SECONDS
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until interrupted; the model loads meanwhile. Returns the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if problem := port_problem(arguments.host, arguments.port):
        parser.exit(2, f"{parser.prog}: {problem}\n")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # The page and the log say how far loading has come.
    bars: Any = transformers_logging
    bars.disable_progress_bar()
    # The longest time that the engine's thread waits for a thread of the page to yield.
    sys.setswitchinterval(0.001)
    decorator = gpu_decorator()
    if decorator is not None:
        return _serve_on_zero_gpu(arguments, decorator)
    backend = Backend()
    backend.start(
        partial(load, model=arguments.model, device=arguments.device, dtype=arguments.dtype, depth=arguments.depth)
    )
    try:
        build_app(backend).launch(
            server_name=arguments.host, server_port=arguments.port, share=arguments.share or None, **launch_options()
        )
    finally:
        backend.close()
    return 0


def _serve_on_zero_gpu(arguments: argparse.Namespace, decorator: Callable[..., Any]) -> int:
    """Serve the page on ZeroGPU, which lends a GPU to each wall."""
    chat_model = load_chat_model(arguments.model, device="cuda", dtype=arguments.dtype)
    backend = Backend(zero=ZeroGpu(chat_model, decorator))
    build_app(backend).launch(server_name=arguments.host, server_port=arguments.port, **launch_options())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
