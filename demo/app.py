"""The demo page: a streaming chat on the engine, and the engine's live figures.

Run it with ``python -m demo.app`` or ``python demo/app.py``; on a Space, this folder is the root.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import torch

if not __package__:
    # Run as a file, this module has no package (PEP 366): it gets the one that its folder is, whatever its name.
    _folder = Path(__file__).resolve().parent
    sys.path.insert(0, str(_folder.parent))
    __package__ = _folder.name
    importlib.import_module(__package__)

from .chat import ChatService, Settings
from .figures import Meter
from .handlers import MAX_NEW_TOKENS, ChatHandlers
from .models import ChatModel, ModelLoadError, load_chat_model
from .page import EXAMPLES, FOCUS_JS, PLACEHOLDER, TITLE, header_html, launch_options, note_html

if TYPE_CHECKING:
    from hf_async_batching import GenerationManager

CONCURRENT_CHATS = 64
_LONGEST_MESSAGE = 20_000
_BUTTON_WIDTH = 84


def build_app(manager: GenerationManager, chat_model: ChatModel) -> gr.Blocks:
    """Build the page. Launch it with ``app.launch(**launch_options())``: Gradio takes the looks there."""
    handlers = ChatHandlers(ChatService(manager, chat_model))
    meter = Meter(manager, "GPU busy" if chat_model.model.device.type == "cuda" else "CPU compute busy")

    async def figures() -> str:
        return meter.html()

    app = gr.Blocks(title=TITLE, analytics_enabled=False)
    with app:
        history = gr.State([])
        gr.HTML(header_html(_facts(chat_model)), elem_id="top")
        strip = gr.HTML(meter.html(), elem_id="figures")
        with gr.Row(equal_height=False, elem_id="columns"):
            with gr.Column(scale=7, min_width=300):
                chatbot, box, send, stop = _chat()
                note = gr.HTML(note_html(""), elem_id="note")
            with gr.Column(scale=3, min_width=260):
                controls = _controls()

        page = [history, chatbot, box, note, send, stop]
        # Every event of the chat goes through the queue: only there do results reach the page in the order in which
        # they were made, so that nothing of a cancelled answer arrives after the page was cleared.
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        chatty = quiet | {"concurrency_limit": CONCURRENT_CHATS}
        gr.on([box.submit, send.click], handlers.submit, [box, history, *controls], page, **chatty)
        chatbot.example_select(handlers.example, [history, *controls], page, **chatty)
        chatbot.retry(handlers.retry, [history, *controls], page, **chatty)
        chatbot.undo(handlers.undo, [history], page, **quiet)
        chatbot.clear(handlers.clear, None, page, **quiet)
        stop.click(handlers.stop, None, None, queue=False, **quiet)
        gr.on([gr.Timer(1.0).tick, app.load], figures, None, strip, queue=False, **quiet)
        app.load(None, None, None, js=FOCUS_JS, api_visibility="private")
        app.unload(handlers.leave)
    app.queue(default_concurrency_limit=CONCURRENT_CHATS, api_open=False)
    return app


def _chat() -> tuple[gr.Chatbot, gr.Textbox, gr.Button, gr.Button]:
    """Lay out the conversation and the line to type in."""
    chatbot = gr.Chatbot(
        label="Chat",
        show_label=False,
        elem_id="chat",
        placeholder=PLACEHOLDER,
        examples=[{"text": example} for example in EXAMPLES],
        buttons=["copy"],
        layout="bubble",
        height=None,
    )
    with gr.Row(elem_id="ask"):
        box = gr.Textbox(
            label="Your message",
            placeholder="Type a message",
            show_label=False,
            container=False,
            lines=1,
            max_lines=6,
            max_length=_LONGEST_MESSAGE,
            elem_id="message",
        )
        # Two buttons in one place: only one of them is ever shown.
        send = gr.Button("Send", variant="primary", elem_id="send", min_width=_BUTTON_WIDTH, scale=0)
        stop = gr.Button("Stop", variant="stop", elem_id="stop", visible=False, min_width=_BUTTON_WIDTH, scale=0)
    return chatbot, box, send, stop


def _controls() -> list[gr.components.Component]:
    """Lay out the settings, in the order in which the handlers take them."""
    default = Settings()
    with gr.Group(elem_classes="knobs"):
        system = gr.Textbox(
            label="System prompt",
            placeholder="You are a helpful assistant.",
            lines=2,
            max_lines=5,
            max_length=_LONGEST_MESSAGE,
        )
        longest = gr.Slider(
            8, MAX_NEW_TOKENS, value=default.max_new_tokens, step=8, label="Max new tokens", buttons=[]
        )
        greedy = gr.Checkbox(default.greedy, label="Greedy", info="Always the likeliest token; no sampling.")
        temperature = gr.Slider(0.1, 2.0, value=default.temperature, step=0.05, label="Temperature", buttons=[])
        top_p = gr.Slider(0.05, 1.0, value=default.top_p, step=0.05, label="Top-p", buttons=[])

    # In the browser: a round trip to the server would only make the switch lag.
    greedy.change(
        None,
        greedy,
        [temperature, top_p],
        js="on => [{__type__: 'update', interactive: !on}, {__type__: 'update', interactive: !on}]",
        api_visibility="private",
    )
    return [system, longest, temperature, top_p, greedy]


def _facts(chat_model: ChatModel) -> list[tuple[str, str]]:
    device = chat_model.model.device
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{device.type.upper()}, {torch.get_num_threads()} threads"
    dtype = str(chat_model.model.dtype).removeprefix("torch.")
    versions = [(name, _version(name)) for name in ("torch", "transformers", "gradio")]
    return [("Model", chat_model.name), ("on", hardware), ("in", dtype), *versions, ("", chat_model.source)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main(argv: Sequence[str] | None = None) -> int:
    """Load a model, start the engine, serve the page until interrupted. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from hf_async_batching import BatchingConfig, GenerationManager

    try:
        chat_model = load_chat_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    except ModelLoadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # A page that stands open keeps its engine: a visitor who comes back should not wait for it to start again.
    config = BatchingConfig(depth=arguments.depth, idle_timeout=None)
    with GenerationManager(chat_model.model, config) as manager:
        manager.warmup()
        app = build_app(manager, chat_model)
        app.launch(
            server_name=arguments.host, server_port=arguments.port, share=arguments.share or None, **launch_options()
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m demo.app", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a Hub id or a local folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--host", help="address to listen on (default: this machine only; 0.0.0.0 for everyone)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="open a public Gradio link")
    parser.add_argument(
        "--depth", type=int, help="steps in flight; 1 is synchronous (default: 2 on a GPU, 1 on a CPU)"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu … (default: the GPU when there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16 … (default: bfloat16 on a GPU, else float32)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
