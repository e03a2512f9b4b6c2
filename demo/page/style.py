"""The page's theme, style sheet and scripts, and the arguments of `launch` that carry them."""

from __future__ import annotations

import os
from typing import Any

import gradio as gr

from ..serving.assets import asset
from .guard import app_options

TITLE = "hf_async_batching"
# Questions that a model of 135 million parameters can answer.
EXAMPLES = (
    "What is the capital of France?",
    "Name three fruits.",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
)
PLACEHOLDER = "### Your own chat\nOne batch answers you and all other visitors."

MAX_UPLOAD = 20 << 20
# Gradio keeps a copy of its config, some 140 kB, for so many sessions; this page keeps nothing in them.
_SESSIONS = 500
# Events that may run at once; a stream is one event until it ends.
_MAX_EVENTS = 400
_SCRIPTS = ("hero.js", "lanes.js", "panel.js", "reader.js", "wall.js", "race.js", "picture.js", "compare.js")
_FONTS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "sans-serif"]
_MONO_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]

# On a wide screen a keyboard is at hand. On a phone the focus would open one and scroll the page.
FOCUS_JS = """() => {
  if (matchMedia("(min-width: 900px)").matches)
    document.querySelector("#message textarea")?.focus({ preventScroll: true });
}"""

# Start, Stop and Add of a wall that is over.
WALL_IDLE_JS = """() => [{ __type__: "update", visible: true }, { __type__: "update", visible: false },
  { __type__: "update", interactive: false }]"""

# Whenever an event ends, Gradio makes a pandas table of all events, for a page that is not shown here.
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000")


def launch_options() -> dict[str, Any]:
    """Return the arguments of `Blocks.launch` for the page's look and limits."""
    # Fonts of the visitor's own system: the page fetches none, and text never jumps when a font arrives.
    theme = gr.themes.Base(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=_FONTS,
        font_mono=_MONO_FONTS,
    ).set(
        # Darker than the theme's own: text must reach a contrast of 4.5 to 1.
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        checkbox_border_color_dark="*neutral_500",
    )
    return {
        "theme": theme,
        "css": asset("style.css"),
        "head": f"<script>{''.join(map(asset, _SCRIPTS))}</script>",
        "footer_links": ["api", "gradio", "settings"],
        "ssr_mode": False,
        "max_threads": _MAX_EVENTS,
        "max_file_size": MAX_UPLOAD,
        "run_history": False,
        "state_session_capacity": _SESSIONS,
        # A form has a few lines of its own beside the file.
        "app_kwargs": app_options(MAX_UPLOAD + (64 << 10)),
    }
