"""The text of a handle's tokens as they are generated, in pieces of whole characters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

from hf_async_batching.token_stream import AsyncTokenIterator, TokenIterator, TokenSource

# What a decoder shows for bytes that are not a character, or not yet. A character has at most four bytes.
_INCOMPLETE = "\ufffd"
_MOST_HELD = 4

# A window of the last tokens is decoded for each piece. A new window starts with a few tokens already shown.
_WINDOW = 16
_CONTEXT = range(4, 12)

# Beginnings of texts that a tokenizer's clean-up shortens (" ' ", " n't", " 've", " ."): they may disappear again.
_CLEANED = (" ", " n", " n'", " '", " 'v", " 'r")


class TextDecoder:
    """Makes text from tokens that come in pieces; joined, it equals `tokenizer.decode` of all tokens.

    A text never ends inside a code point: text whose last bytes can still become another character is held back.
    A piece is decoded once, with a few tokens before it: its cost does not depend on the number of earlier tokens,
    except in the last call.

    Args:
        tokenizer: The model's tokenizer.
        arguments: As for `tokenizer.decode`.
    """

    def __init__(self, tokenizer: Any, **arguments: Any) -> None:
        cleans_up = arguments.get("clean_up_tokenization_spaces")
        own = getattr(tokenizer, "clean_up_tokenization_spaces", False)
        self._cleans_up = bool(own if cleans_up is None else cleans_up)
        self._decode = _decoder_of(tokenizer, arguments, self._cleans_up)
        self._bytes = _byte_tokens(tokenizer)
        self._ids: list[int] = []
        self._start = 0  # of the window
        self._shown = 0  # number of its characters that were returned
        self._returned = 0  # characters, of all windows
        self._in_run = False  # whether the tokens end with byte tokens

    def push(self, *tokens: int) -> str:
        """Take the next tokens; return the text that has become certain, which may be empty."""
        if not tokens:
            return ""
        first = len(self._ids)
        self._ids += tokens
        # A run of byte tokens is decoded as a whole: a run that is not text changes the characters before it too.
        stop = len(self._ids)
        if self._in_run or (self._bytes and not self._bytes.isdisjoint(tokens)):
            stop, self._in_run = self._trailing_run(first)
            if stop == first:
                return ""
        text = self._decode(self._ids[self._start : stop])
        end = self._certain(text) if self._cleans_up or text.endswith(_INCOMPLETE) else len(text)
        piece = text[self._shown : end]
        if piece:
            self._shown = end
            self._returned += len(piece)
        if stop - self._start >= _WINDOW:
            self._begin_anew(text, stop)
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

    def _begin_anew(self, text: str, stop: int) -> None:
        held = len(text) - self._shown
        for context in _CONTEXT:
            begun = self._decode(self._ids[stop - context : stop])
            if len(begun) > held and text.endswith(begun):  # otherwise the window would start inside a character
                self._start, self._shown = stop - context, len(begun) - held
                return

    def _trailing_run(self, first: int) -> tuple[int, bool]:
        """Where, from `first` on, the byte tokens begin with which the tokens end, and whether there are any.

        Tokens that show nothing, such as skipped special tokens, do not end a run.
        """
        found, index = False, len(self._ids)
        while index > first:
            token = self._ids[index - 1]
            if token in self._bytes:
                found = True
            elif self._decode([token, token]):  # twice: some decoders drop the first space of a text
                break
            index -= 1
        found = found or (index == first and self._in_run)
        return index if found else len(self._ids), found


def _decoder_of(tokenizer: Any, arguments: dict[str, Any], cleans_up: bool) -> Callable[[list[int]], str]:
    """Return the function that decodes a list of integers: `tokenizer.decode`, or what it calls where that is known.

    `decode` first looks at every token to see whether it is a tensor, which takes half of its time.
    """
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    known = isinstance(tokenizer, PreTrainedTokenizerFast) and not {"decode", "_decode"} & vars(tokenizer).keys()
    if known and kind.decode is PreTrainedTokenizerBase.decode and kind._decode is PreTrainedTokenizerFast._decode:
        others = arguments.keys() - {"skip_special_tokens", "clean_up_tokenization_spaces"}
        if not cleans_up and not others:
            skip = bool(arguments.get("skip_special_tokens", False))
            backend: Any = tokenizer.backend_tokenizer
            return partial(backend.decode, skip_special_tokens=skip)
    return partial(tokenizer.decode, **arguments)


def _byte_tokens(tokenizer: Any) -> frozenset[int]:
    """Return the tokens for single bytes, as SentencePiece's byte fallback has; empty where there are none."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    try:
        # An unknown name becomes None or the unknown token.
        if tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(names[:1])) != names[:1]:
            return frozenset()
        return frozenset(tokenizer.convert_tokens_to_ids(names))
    except Exception:  # a tokenizer of another make, which knows no such name
        return frozenset()


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
