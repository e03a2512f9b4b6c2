"""Text in and out of the model: incremental detokenising, safe display, prompts that users cannot forge."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
# A UTF-8 character has at most four bytes, so at most four tokens: more than that is no half character but rubbish.
_MOST_BYTE_TOKENS = 4
_WINDOW = 24
_CONTEXT = 6

# Fenced code (an open fence runs to the end while the answer is being written) and code spans stay as they are.
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})")
_INDENT = re.compile(r"[ \t]*")
_TICKS = re.compile(r"`+")
# A run of backslashes is read once, from its first one on: visitors can send thousands of them.
_TAG = re.compile(r"(?<!\\)(\\*+)<(?=[A-Za-z/!?])")
_ENTITY = re.compile(r"&(?=#?\w+;)")


class Detokenizer:
    """Turns a stream of token ids into a stream of text, never breaking a character in two.

    Only a short window of the last tokens is decoded again for each new one, so a token costs the same however long
    the answer already is. The window begins with tokens that were shown before: tokenizers that treat the first
    token of a text specially (a dropped leading space) treat it alike before and after, and the difference is right.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # What a fast tokenizer wraps takes half the time: the wrapper looks at every token.
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = ""
        self._held = 0

    def push(self, *tokens: int) -> str:
        """Take more tokens; return the text that they complete (what follows the last complete character is held)."""
        self._window += tokens
        text = self._decode(self._window)
        if text.endswith(_INCOMPLETE) and self._held < _MOST_BYTE_TOKENS:
            self._held += 1
            if len(tokens) == 1:
                return ""
            # Many at once: show what is certain, which is all but the end.
            text = text.rstrip(_INCOMPLETE)
            new, self._shown = text[len(self._shown) :], max(text, self._shown, key=len)
            self._held = 1 if new else self._held
            return new
        self._held = 0
        new = text[len(self._shown) :]
        self._shown = text
        if len(self._window) >= _WINDOW:
            self._window = self._window[-_CONTEXT:]
            self._shown = self._decode(self._window)
        return new

    def flush(self) -> str:
        """Return what is still held back, without the half character that the answer may have ended on."""
        text = self._decode(self._window)
        new = text[len(self._shown) :].rstrip(_INCOMPLETE)
        self._window, self._shown, self._held = [], "", 0
        return new

    def _decode(self, tokens: list[int]) -> str:
        if self._backend is not None:
            return str(self._backend.decode(tokens, skip_special_tokens=True))
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)


def display_markdown(text: str) -> str:
    """Return Markdown that shows HTML tags in `text` as they were typed, instead of losing them to the sanitizer.

    Code is left alone: Markdown shows tags in it as they are, and would show an escape as well. The time is linear in
    the length of `text`, whatever it holds.
    """
    parts: list[str] = []
    end = 0
    for start, stop in _code(text):
        parts += [_escape(text[end:start]), text[start:stop]]
        end = stop
    parts.append(_escape(text[end:]))
    return "".join(parts)


def _code(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of every fenced block and every code span, from the left; no two overlap."""
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
    """Yield (start, end) of the code spans of a line: a run of backticks closes at the next run as long as itself."""
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
    except Exception:  # some templates (Gemma's) know no system role and raise whatever Jinja raises
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
