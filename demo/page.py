"""How the page looks: theme, style sheet, the lines at its top, and the arguments of `launch` that carry them."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

TITLE = "hf_async_batching"
TAGLINE = "Continuous batching for Hugging Face <code>generate</code>: everyone on this page shares one batch."
EXAMPLES = (
    "Explain photosynthesis to a ten-year-old.",
    "Write a Python function that reverses a list.",
    "What is the capital of France, and what is it known for?",
    "Give me three ideas for a rainy Sunday.",
)
PLACEHOLDER = "### Ask something\nOpen a second tab and ask there too: both answers come out of the same steps."

_FONTS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "sans-serif"]
_MONO_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]

CSS = """
/* The width is said: with automatic margins alone, the page would be as wide as its longest line. */
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto; }
.gradio-container > .main { padding: 16px clamp(16px, 4vw, 56px) !important; }
.gradio-container main { padding: 0 !important; min-width: 0; }
#top .html-container, #figures .html-container, #note .html-container { padding: 0; }

#top h1 { font-size: 1.55rem; font-weight: 700; letter-spacing: -.02em; margin: 0; color: var(--body-text-color); }
#top p { margin: .2rem 0 0; color: var(--body-text-color-subdued); }
#top code { font-size: .92em; padding: 0; background: none; border: 0; color: inherit; }
#top ul { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; padding: 0; margin: .6rem 0 0; }
#top li { margin: 0; padding: 0; font-size: .82rem; line-height: 1.5; color: var(--body-text-color-subdued); }
#top li b { font-weight: 600; color: var(--body-text-color); }

.strip { display: grid; grid-template-columns: 1.6fr .8fr .8fr 1.2fr 1.2fr; margin: 0; overflow: hidden;
  border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg);
  background: var(--block-background-fill); }
.strip .cell { padding: .65rem .95rem .7rem; min-width: 0; border-left: 1px solid var(--border-color-primary); }
.strip .cell:first-child { border-left: 0; }
.strip dt { font-size: .75rem; line-height: 1.4; color: var(--body-text-color-subdued); white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis; }
.strip dd { margin: .1rem 0 0; font-size: 1.4rem; font-weight: 600; line-height: 1.25; white-space: nowrap;
  font-variant-numeric: tabular-nums; color: var(--body-text-color); position: relative; }
.strip dd small { font-size: .8rem; font-weight: 400; color: var(--body-text-color-subdued); }
.strip .picture { display: block; height: 4px; margin-top: .5rem; }
.strip .wide .picture { position: absolute; margin: 0; height: 42px; width: 50%; right: 0; top: -6px; }
.strip .bar { display: block; height: 4px; border-radius: 2px; background: var(--border-color-primary);
  overflow: hidden; }
.strip .bar span { display: block; height: 100%; background: var(--color-accent); }
.strip svg { width: 100%; height: 100%; display: block; }
.strip polyline { fill: none; stroke: var(--color-accent); stroke-width: 1.75; stroke-linejoin: round; }
.strip polygon { fill: var(--color-accent); opacity: .14; }

#chat { height: clamp(340px, calc(100dvh - 388px), 760px) !important; }
#chat .message { overflow-wrap: anywhere; }
#chat .placeholder { text-align: center; }
#note { min-height: 1.4rem; }
#note p { margin: 0; font-size: .82rem; line-height: 1.4rem; color: var(--body-text-color-subdued);
  font-variant-numeric: tabular-nums; }
#ask { align-items: stretch; gap: 8px; flex-wrap: nowrap; }
#ask button { min-width: 84px !important; flex: 0 0 84px; font-size: 1rem; }
footer .show-api-divider { display: none !important; }
.dark .knobs input[type=range] { --neutral-200: var(--neutral-600); }

@media (max-width: 640px) {
  #message textarea { font-size: 16px; }  /* below that, phones zoom in when it gets the focus */
  #chat .placeholder { padding-inline: 16px; }
  .strip { grid-template-columns: repeat(4, 1fr); }
  .strip .cell { grid-column: span 2; padding: .5rem .75rem .55rem; }
  .strip .cell:nth-child(2), .strip .cell:nth-child(3) { grid-column: span 1; }
  .strip .cell:nth-child(n+4) { border-top: 1px solid var(--border-color-primary); }
  .strip .cell:nth-child(4) { border-left: 0; }
  .strip dd { font-size: 1.15rem; }
  .strip .wide .picture { width: 45%; height: 24px; top: 1px; }
  #chat { height: clamp(360px, calc(100dvh - 470px), 620px) !important; }
  #chat .placeholder { padding-block: 8px; }
  #chat .example { padding: 8px 12px; }
}
"""
# A keyboard is at hand where the page is wide; on a phone the focus would open one and scroll the page.
FOCUS_JS = """() => {
  if (matchMedia("(min-width: 900px)").matches)
    document.querySelector("#message textarea")?.focus({ preventScroll: true });
}"""


def launch_options() -> dict[str, Any]:
    """Return the arguments of `Blocks.launch` that make the page look as it should."""
    # Fonts of the visitor's own system: nothing is fetched from anywhere, and text never jumps when a font arrives.
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
    return {"theme": theme, "css": CSS, "footer_links": ["gradio", "settings"], "ssr_mode": False}


def header_html(facts: list[tuple[str, str]]) -> str:
    """Return title, tagline, and one line of (name, value) facts; a fact without a name is a sentence."""
    items = "".join(
        f"<li>{escape(name)} <b>{escape(value)}</b></li>" if name else f"<li>{escape(value)}</li>"
        for name, value in facts
    )
    return f"<h1>{TITLE}</h1><p>{TAGLINE}</p><ul>{items}</ul>"


def note_html(note: str) -> str:
    """Return the line under the chat. A screen reader speaks it when it changes."""
    return f'<p role="status">{escape(note)}</p>'
