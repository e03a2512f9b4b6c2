"""The text of a handle's tokens as they are made, in pieces that are whole characters."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

from hf_async_batching.token_stream import AsyncTokenIterator, TokenIterator, TokenSource

# What a decoder shows for bytes that are no character, or not yet. A character has at most four bytes.
_INCOMPLETE = "\ufffd"
_MOST_HELD = 4

# A window of the last tokens is decoded for each new one. It begins anew with a few tokens that were shown already.
_WINDOW = 48
_CONTEXT = range(6, 13)

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

# Beginnings of what a tokenizer's clean-up shortens (" ' ", " n't", " 've", " ."): they may go away again.
_CLEANED = (" ", " n", " n'", " '", " 'v", " 'r")


class TextDecoder:
    """Makes text of tokens that come one by one; the pieces joined are what `tokenizer.decode` makes of all tokens.

    A piece never ends inside of a code point: text whose last bytes can still become another character is held back.
    The cost of a token does not depend on how many came before it, but for the last call.

    Args:
        tokenizer: The model's.
        arguments: As for `tokenizer.decode`.
    """

    def __init__(self, tokenizer: Any, **arguments: Any) -> None:
        self._tokenizer = tokenizer
        self._arguments = arguments
        own = getattr(tokenizer, "clean_up_tokenization_spaces", False)
        self._cleans_up = bool(arguments.get("clean_up_tokenization_spaces", own))
        self._ids: list[int] = []
        self._start = 0
        self._decoded = ""  # of the window
        self._shown = 0  # characters of it that were returned
        self._in_bytes = False
        self._pieces: list[str] = []

    def push(self, token: int) -> str:
        """Take a token; return the text that is certain now and was not before, which may be empty."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        unchanged, self._decoded = text == self._decoded, text
        # A run of byte tokens is decoded as a whole: one that is no text changes the characters before it too.
        self._in_bytes = self._is_byte(token) or (self._in_bytes and unchanged)
        if self._in_bytes:
            return ""
        end = self._certain(text)
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        if end == len(text) and len(self._ids) - self._start >= _WINDOW:
            self._begin_anew(text)
        self._pieces.append(piece)
        return piece

    def flush(self) -> str:
        """Return the rest, when all tokens are there; half a character is shown as `decode` shows it."""
        whole, shown = self._decode(self._ids), "".join(self._pieces)
        self._pieces = [whole]
        return whole[len(shown) :]

    def _certain(self, text: str) -> int:
        """How many characters of a text will stay as they are, whatever comes."""
        held = len(text) - len(text.rstrip(_INCOMPLETE))
        end = len(text) - min(held, _MOST_HELD)
        while self._cleans_up and (space := text.rfind(" ", 0, end)) >= 0 and text[space:end] in _CLEANED:
            end = space
        return end

    def _begin_anew(self, text: str) -> None:
        for context in _CONTEXT:
            begun = self._decode(self._ids[-context:])
            if begun and text.endswith(begun):  # else the window would begin inside of a character
                self._start, self._decoded, self._shown = len(self._ids) - context, begun, len(begun)
                return

    def _is_byte(self, token: int) -> bool:
        name: Any = self._tokenizer.convert_ids_to_tokens(token)
        return isinstance(name, str) and _BYTE_TOKEN.fullmatch(name) is not None

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, **self._arguments)
        return text


class TextStream:
    """Text to iterate over, with `for` or `async for`; each iterator begins with the first token.

    Args:
        handle: Where the tokens come from.
        tokenizer: The model's.
        arguments: As for `tokenizer.decode`.
    """

    def __init__(self, handle: TokenSource, tokenizer: Any, arguments: dict[str, Any]) -> None:
        self._handle = handle
        self._tokenizer = tokenizer
        self._arguments = arguments

    def __iter__(self) -> Iterator[str]:
        """Pieces of text as they are made; raises what ends the request with an error."""
        return _TextIterator(TokenIterator(self._handle), TextDecoder(self._tokenizer, **self._arguments))

    def __aiter__(self) -> AsyncIterator[str]:
        """Like `__iter__`, without blocking the event loop."""
        return _AsyncTextIterator(AsyncTokenIterator(self._handle), TextDecoder(self._tokenizer, **self._arguments))


class _TextIterator:
    def __init__(self, tokens: TokenIterator, decoder: TextDecoder) -> None:
        self._tokens = tokens
        self._decoder = decoder

    def __iter__(self) -> _TextIterator:
        return self

    def __next__(self) -> str:
        for token in self._tokens:
            if piece := self._decoder.push(token):
                return piece
        if rest := self._decoder.flush():
            return rest
        raise StopIteration


class _AsyncTextIterator:
    def __init__(self, tokens: AsyncTokenIterator, decoder: TextDecoder) -> None:
        self._tokens = tokens
        self._decoder = decoder

    def __aiter__(self) -> _AsyncTextIterator:
        return self

    async def __anext__(self) -> str:
        async for token in self._tokens:
            if piece := self._decoder.push(token):
                return piece
        if rest := self._decoder.flush():
            return rest
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the iteration; the request goes on."""
        await self._tokens.aclose()
