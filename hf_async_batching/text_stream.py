"""The text of a handle's tokens as they are generated, in pieces of whole characters."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

from hf_async_batching.token_stream import AsyncTokenIterator, TokenIterator, TokenSource

# What a decoder shows for bytes that are not a character, or not yet. A character has at most four bytes.
_INCOMPLETE = "\ufffd"
_MOST_HELD = 4

# A window of the last tokens is decoded for each new token. A new window starts with a few tokens already shown.
_WINDOW = 48
_CONTEXT = range(6, 13)

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

# Beginnings of texts that a tokenizer's clean-up shortens (" ' ", " n't", " 've", " ."): they may disappear again.
_CLEANED = (" ", " n", " n'", " '", " 'v", " 'r")


class TextDecoder:
    """Makes text from tokens that come one by one; joined, it equals `tokenizer.decode` of all tokens.

    A piece never ends inside a code point: text whose last bytes can still become another character is held back.
    The cost of a token does not depend on the number of earlier tokens, except in the last call.

    Args:
        tokenizer: The model's tokenizer.
        arguments: As for `tokenizer.decode`.
    """

    def __init__(self, tokenizer: Any, **arguments: Any) -> None:
        self._tokenizer = tokenizer
        self._arguments = arguments
        own = getattr(tokenizer, "clean_up_tokenization_spaces", False)
        self._cleans_up = bool(arguments.get("clean_up_tokenization_spaces", own))
        self._ids: list[int] = []
        self._start = 0
        self._decoded = ""  # text of the window
        self._shown = 0  # number of its characters that were returned
        self._in_bytes = False
        self._returned = 0  # characters, of all windows

    def push(self, token: int) -> str:
        """Take a token; return the text that has become certain, which may be empty."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        unchanged, self._decoded = text == self._decoded, text
        # A run of byte tokens is decoded as a whole: a run that is not text changes the characters before it too.
        self._in_bytes = self._is_byte(token) or (self._in_bytes and unchanged)
        if self._in_bytes:
            return ""
        end = self._certain(text)
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        if end == len(text) and len(self._ids) - self._start >= _WINDOW:
            self._begin_anew(text)
        self._returned += len(piece)
        return piece

    def flush(self) -> str:
        """Return the rest, after the last token; an incomplete character is shown as `decode` shows it."""
        rest = self._decode(self._ids)[self._returned :]
        self._returned += len(rest)
        return rest

    def _certain(self, text: str) -> int:
        """Number of characters of a text that later tokens cannot change."""
        held = len(text) - len(text.rstrip(_INCOMPLETE))
        end = len(text) - min(held, _MOST_HELD)
        while self._cleans_up and (space := text.rfind(" ", 0, end)) >= 0 and text[space:end] in _CLEANED:
            end = space
        return end

    def _begin_anew(self, text: str) -> None:
        for context in _CONTEXT:
            begun = self._decode(self._ids[-context:])
            if begun and text.endswith(begun):  # otherwise the window would start inside a character
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
        handle: Source of the tokens.
        tokenizer: The model's tokenizer.
        arguments: As for `tokenizer.decode`.
    """

    def __init__(self, handle: TokenSource, tokenizer: Any, arguments: dict[str, Any]) -> None:
        self._handle = handle
        self._tokenizer = tokenizer
        self._arguments = arguments

    def __iter__(self) -> Iterator[str]:
        """Pieces of text as they are generated; raises the error that ends the request."""
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
        """End the iteration; the request continues."""
        await self._tokens.aclose()
