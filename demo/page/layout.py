"""Lays out the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gradio as gr

from ..compare.handlers import RACE_QUESTIONS, RACE_TOKENS
from ..dataset.handlers import table_html
from ..dataset.table import BUILT_IN, FORMATS, built_in, text_columns
from ..serving.assets import asset
from ..serving.settings import BOUNDS, KNOBS, LONGEST_TEXT, MAX_NEW_TOKENS, Settings
from ..wall.prompts import LONGEST_PROMPTS
from ..wall.wall import MOST_CHATS, MOST_TURNS, WALL
from .style import EXAMPLES, PLACEHOLDER

_BUTTON_WIDTH = 84


class ChatParts(NamedTuple):
    """The chat's components; `knobs` has the order that the handlers expect."""

    chatbot: gr.Chatbot
    box: gr.Textbox
    send: gr.Button
    stop: gr.Button
    note: gr.HTML
    knobs: list[gr.components.Component]


class WallParts(NamedTuple):
    """The wall's components; `knobs` has the order that the handlers expect."""

    start: gr.Button
    stop: gr.Button
    add: gr.Button
    wall: gr.HTML
    prompts: gr.Textbox
    knobs: list[gr.components.Component]


class CompareParts(NamedTuple):
    """The components of the race."""

    chats: gr.Slider
    longest: gr.Slider
    run: gr.Button
    stop: gr.Button
    view: gr.HTML


class DatasetParts(NamedTuple):
    """The Dataset tab's components; `knobs` has the order that the handlers expect."""

    source: gr.Dropdown
    file: gr.File
    column: gr.Dropdown
    about: gr.HTML
    knobs: list[gr.components.Component]
    run: gr.Button
    stop: gr.Button
    resume: gr.Button
    progress: gr.HTML
    rows: gr.HTML
    download: gr.DownloadButton


def chat_parts() -> ChatParts:
    """Lay out the conversation, the line to type in, and the settings."""
    chatbot = gr.Chatbot(
        label="Your chat",
        show_label=False,
        elem_id="chat",
        placeholder=PLACEHOLDER,
        examples=[{"text": example} for example in EXAMPLES],
        buttons=["copy"],
        editable="user",
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
            max_length=LONGEST_TEXT,
            elem_id="message",
        )
        # Two buttons in one place: the page shows one of them at a time.
        send = gr.Button("Send", variant="primary", elem_id="send", min_width=_BUTTON_WIDTH, scale=0)
        stop = gr.Button("Stop", variant="stop", elem_id="stop", visible=False, min_width=_BUTTON_WIDTH, scale=0)
    note = gr.HTML('<p role="status"></p>', elem_id="note")
    default = Settings()
    with gr.Accordion("System prompt and sampling", open=False), gr.Group(elem_classes="knobs"):
        system = gr.Textbox(
            label="System prompt",
            placeholder="You are a helpful assistant.",
            lines=2,
            max_lines=5,
            max_length=LONGEST_TEXT,
        )
        longest = _longest(default.max_new_tokens, "Max new tokens")
        greedy = _greedy(default.greedy, "Greedy")
        least, most, _ = BOUNDS["temperature"]
        temperature = gr.Slider(least, most, value=default.temperature, step=0.05, label="Temperature", buttons=[])
        least, most, _ = BOUNDS["top_p"]
        top_p = gr.Slider(least, most, value=default.top_p, step=0.05, label="Top-p", buttons=[])
        # The API takes up to 1,000, but a slider of so many steps is hard to set.
        top_k = gr.Slider(0, 200, value=default.top_k, step=1, label="Top-k (0 is off)", buttons=[])
        # A text box: the browser sends 0 for an empty number box.
        seed = gr.Textbox("", label="Seed", placeholder="empty: a new one for each answer", max_length=10, lines=1)
    # Runs in the browser: a round trip to the server would make the switch lag.
    greedy.change(
        None,
        greedy,
        [temperature, top_p, top_k, seed],
        js="on => Array(4).fill({__type__: 'update', interactive: !on})",
        api_visibility="private",
    )
    knobs: dict[str, gr.components.Component] = {
        "system": system,
        "max_new_tokens": longest,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "greedy": greedy,
        "seed": seed,
    }
    return ChatParts(chatbot, box, send, stop, note, [knobs[name] for name in KNOBS])


def wall_parts(prompts: str, server_functions: list[Callable[..., Any]]) -> WallParts:
    """Lay out the wall: how many, start, stop, the settings, the tiles."""
    with gr.Row(elem_id="walls", equal_height=False):
        chats = gr.Slider(
            1, MOST_CHATS, value=WALL.chats, step=1, label="Chats at once", scale=4, min_width=180, buttons=[]
        )
        start = gr.Button(f"Start {WALL.chats} chats", variant="primary", elem_id="start", scale=2, min_width=130)
        stop = gr.Button("Stop all", variant="stop", elem_id="stop-wall", visible=False, scale=2, min_width=130)
        add = gr.Button("Add 4", elem_id="add", interactive=False, scale=1, min_width=_BUTTON_WIDTH)
    with gr.Accordion("Prompts and settings", open=False), gr.Group(elem_classes="knobs"):
        box = gr.Textbox(
            prompts,
            label="Prompts, one per line",
            lines=6,
            max_lines=10,
            max_length=LONGEST_PROMPTS,
            elem_id="prompts",
        )
        turns = gr.Slider(1, MOST_TURNS, value=WALL.turns, step=1, label="Questions per chat", buttons=[])
        longest = _longest(WALL.max_new_tokens, "Max new tokens per answer")
        stagger = gr.Slider(0, 2, value=WALL.stagger, step=0.05, label="Seconds between two starts", buttons=[])
        greedy = _greedy(WALL.greedy, "Greedy")
    wall = gr.HTML(
        value="",
        html_template=asset("wall.html"),
        js_on_load="hfab.wall(element.querySelector('.wall'), props, watch, server, trigger)",
        apply_default_css=False,
        server_functions=server_functions,
        elem_id="wall",
    )
    chats.change(
        None,
        chats,
        start,
        js="n => ({__type__: 'update', value: `Start ${n} chat${n === 1 ? '' : 's'}`})",
        api_visibility="private",
    )
    return WallParts(start, stop, add, wall, box, [chats, box, turns, longest, stagger, greedy])


def compare_parts() -> CompareParts:
    """Lay out the race."""
    with gr.Row(elem_id="comparisons", equal_height=False):
        chats = gr.Slider(2, RACE_QUESTIONS, value=8, step=1, label="Questions", scale=2, min_width=130, buttons=[])
        longest = gr.Slider(
            16, RACE_TOKENS, value=48, step=8, label="Longest answer", scale=2, min_width=130, buttons=[]
        )
        run = gr.Button("Run the race", variant="primary", elem_id="run", scale=1, min_width=130)
        stop = gr.Button("Stop the race", variant="stop", elem_id="stop-run", visible=False, scale=1, min_width=130)
    view = gr.HTML(
        value="",
        html_template=asset("race.html"),
        js_on_load="hfab.race(element.querySelector('.race'), props, watch)",
        apply_default_css=False,
        elem_id="compare",
    )
    return CompareParts(chats, longest, run, stop, view)


def dataset_parts() -> DatasetParts:
    """Lay out the Dataset tab."""
    first = next(iter(BUILT_IN))
    table = built_in(first)
    with gr.Row(equal_height=False):
        with gr.Column(min_width=240):
            source = gr.Dropdown(list(BUILT_IN), value=first, label="Dataset")
            column = gr.Dropdown(text_columns(table), value="prompt", label="Column with the prompts")
        file = gr.File(
            label="Or your own file",
            file_types=[".csv", ".jsonl", ".ndjson", ".json", ".parquet"],
            height=168,
            min_width=240,
            elem_id="upload",
        )
    about = gr.HTML(table_html(table, "prompt", False), elem_id="about")
    with gr.Accordion("Settings", open=False), gr.Group(elem_classes="knobs"):
        system = gr.Textbox(label="System prompt for every row", lines=2, max_lines=5, max_length=LONGEST_TEXT)
        longest = _longest(64, "Max new tokens per row")
        greedy = _greedy(True, "Greedy rows")
        kind = gr.Radio(list(FORMATS), value=FORMATS[0], label="Format of the result")
    with gr.Row(elem_id="datasets", equal_height=False):
        run = gr.Button("Complete all rows", variant="primary", elem_id="complete", min_width=130)
        stop = gr.Button("Stop rows", variant="stop", visible=False, elem_id="stop-rows", min_width=130)
        resume = gr.Button("Resume", visible=False, elem_id="resume", min_width=_BUTTON_WIDTH)
        download = gr.DownloadButton("Download", visible=False, elem_id="download", min_width=_BUTTON_WIDTH)
    progress = gr.HTML('<p role="status"></p>', elem_id="progress")
    rows = gr.HTML("", elem_id="rows")
    knobs: list[gr.components.Component] = [source, file, column, system, longest, greedy, kind]
    return DatasetParts(source, file, column, about, knobs, run, stop, resume, progress, rows, download)


def _longest(value: int, label: str) -> gr.Slider:
    return gr.Slider(8, MAX_NEW_TOKENS, value=value, step=8, label=label, buttons=[])


def _greedy(value: bool, label: str) -> gr.Checkbox:
    return gr.Checkbox(value, label=label, info="Always take the likeliest token; no sampling.")
