"""Makes answers safe to display, and builds prompts that users cannot forge."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from transformers import PreTrainedTokenizerBase

# Fenced code (an open fence runs to the end while the answer is being written) and code spans stay as they are.
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})")
_INDENT = re.compile(r"[ \t]*")
_TICKS = re.compile(r"`+")
# The pattern reads a run of backslashes once, from its start: visitors can send thousands of them.
_TAG = re.compile(r"(?<!\\)(\\*+)<(?=[A-Za-z/!?])")
_ENTITY = re.compile(r"&(?=#?\w+;)")


def display_markdown(text: str) -> str:
    """Return Markdown that shows HTML tags in `text` as they were typed, instead of losing them to the sanitizer.

    Code stays as it is, because Markdown shows both tags and escapes in it literally. The time is linear in the length
    of `text`.
    """
    parts: list[str] = []
    end = 0
    for start, stop in _code(text):
        parts += [_escape(text[end:start]), text[start:stop]]
        end = stop
    parts.append(_escape(text[end:]))
    return "".join(parts)


def _code(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of every fenced block and code span, from left to right, without overlaps."""
    fence, opened, start = "", 0, 0
    while start < len(text):
        stop = text.find("\n", start) + 1 or len(text)
        if fence:
            mark = _INDENT.match(text, start, stop)
            if mark is not None and text.startswith(fence, mark.end()):
                start, fence = mark.end() + len(fence), ""
                yield opened, start
                yield from _spans(text, start, stop)
        elif (mark := _FENCE.match(text, start, stop)) is not None:
            fence, opened = mark.group(1), start
        else:
            yield from _spans(text, start, stop)
        start = stop
    if fence:
        yield opened, len(text)


def _spans(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the code spans of a line; a run of backticks closes at the next run of the same length."""
    runs = [run.span() for run in _TICKS.finditer(text, start, stop)]
    closing: list[int | None] = [None] * len(runs)
    last: dict[int, int] = {}
    for index in range(len(runs) - 1, -1, -1):
        length = runs[index][1] - runs[index][0]
        closing[index] = last.get(length)
        last[length] = index
    index = 0
    while index < len(runs):
        other = closing[index]
        if other is not None:
            yield runs[index][0], runs[other][1]
            index = other
        index += 1


def _escape(text: str) -> str:
    def tag(match: re.Match[str]) -> str:
        backslashes = match.group(1)
        return match.group() if len(backslashes) % 2 else backslashes + "\\<"

    return _TAG.sub(tag, _ENTITY.sub("&amp;", text))


def build_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], system: str = ""
) -> list[int]:
    """Return the token ids of a chat up to the point where the assistant's answer begins."""
    control = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    chat = [{"role": message["role"], "content": disarm(message["content"], control)} for message in messages]
    system = disarm(system.strip(), control)
    if not system:
        return _apply_template(tokenizer, chat)
    try:
        return _apply_template(tokenizer, [{"role": "system", "content": system}, *chat])
    except Exception:  # some templates (Gemma's) have no system role, and raise any error of Jinja
        first = {"role": "user", "content": f"{system}\n\n{chat[0]['content']}"}
        return _apply_template(tokenizer, [first, *chat[1:]])


def _apply_template(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> list[int]:
    ids: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    return [int(token) for token in ids]


def disarm(text: str, control: Sequence[str]) -> str:
    """Break up control tokens that a user typed, so that the text cannot end its own turn or open another one."""
    for token in control:
        text = text.replace(token, f"{token[:1]}\u200b{token[1:]}")
    return text


def note_html(note: str) -> str:
    """Return the line under the chat. A screen reader speaks it when it changes."""
    return f'<p role="status">{escape(note)}</p>'
