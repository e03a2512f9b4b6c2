"""Text as it is made: whole characters, and together exactly what the tokenizer decodes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from support.tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from demo.serving.embedded_model import embedded_model_dir
from hf_async_batching.handle import GenerationHandle
from hf_async_batching.text_stream import TextDecoder

TEXTS = [
    "plain words, and more of them. " * 12,
    "Grüße, 日本語 👩‍🚀👨‍👩‍👧‍👦🇫🇷! ",
    "e\u0301 a\u0308 ก็ नमस्ते " * 3,
    " leading and trailing ",
    "don ' t is n't  it , really ? n ' t",
    "\ufffd real replacement \ufffd\ufffd",
    "",
]


def byte_level() -> Any:
    """One token for each byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def byte_fallback() -> Any:
    """As Llama 2: letters, and bytes for everything else; a decoder that drops the first space."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(33, 127))]
    vocab = {"<unk>": 0} | {token: i + 1 for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def word_pieces() -> Any:
    """With the clean-up that shortens text behind a token."""
    words = ["don", "is", "n", "'", "t", "s", "ve", "re", ",", ".", "?", "!", "it", "really", "n't", "'s"]
    vocab = {"[UNK]": 0} | {word: i + 1 for i, word in enumerate(words)} | {"##ing": len(words) + 1}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", clean_up_tokenization_spaces=True, eos_token="[E]"
    )


def cleaned_word_pieces() -> Any:
    """With the clean-up inside the decoder, as BERT's."""
    tokenizer = word_pieces()
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


MAKERS = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "word pieces": word_pieces,
    "cleaned word pieces": cleaned_word_pieces,
    "letters": tiny_tokenizer,
    "SmolLM2": lambda: AutoTokenizer.from_pretrained(embedded_model_dir()),
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: Any) -> Any:
    return MAKERS[request.param]()


def pieces_of(tokenizer: Any, ids: list[int], size: Callable[[], int] = lambda: 1, **arguments: Any) -> list[str]:
    """The pieces, where each is checked to be a part of the whole in its place.

    Args:
        tokenizer: What decodes.
        ids: All tokens.
        size: Says how many tokens the decoder gets next.
        arguments: As for `decode`.
    """
    decoder, whole = TextDecoder(tokenizer, **arguments), tokenizer.decode(ids, **arguments)
    pieces: list[str] = []
    at = 0
    while at < len(ids):
        count = size()
        pieces.append(decoder.push(*ids[at : at + count]))
        at += count
        assert whole.startswith("".join(pieces)), "what was shown would have to be taken back"
    return [*pieces, decoder.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):
        assert not any("\ufffd" in piece for piece in pieces), "a character came in parts"
        assert pieces[-1] == "" or not ids[3:], "what is certain is not held back"


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_any_tokens(tokenizer: Any, seed: int, skip: bool) -> None:
    """Halves of characters, bytes that are none, special tokens between them."""
    draw = random.Random(seed)
    vocab = len(tokenizer)
    special = tokenizer.eos_token_id
    ids = [draw.randrange(min(vocab, 300) if seed % 2 else vocab) for _ in range(150)]
    ids = [special if draw.random() < 0.05 else token for token in ids]
    assert "".join(pieces_of(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(
        ids, skip_special_tokens=skip
    )


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_any_tokens_in_any_pieces(tokenizer: Any, seed: int, skip: bool) -> None:
    draw = random.Random(seed)
    words = tokenizer(TEXTS[seed % len(TEXTS)] * 4, add_special_tokens=False).input_ids
    drawn = [draw.randrange(min(len(tokenizer), 300)) for _ in range(100)]
    ids = [tokenizer.eos_token_id if draw.random() < 0.05 else token for token in [*words[:200], *drawn, *words[:60]]]
    longest = draw.choice([2, 4, 9, 40, 400])
    pieces = pieces_of(tokenizer, ids, lambda: draw.randrange(longest + 1), skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("size", [2, 3, 8, 40])
@pytest.mark.parametrize("name", ["byte level", "byte fallback", "SmolLM2"])
def test_many_tokens_at_once_are_not_held_back(name: str, size: int) -> None:
    tokenizer = MAKERS[name]()
    text = "Grüße und 日本 oder 👩! " * 20
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = pieces_of(tokenizer, ids, lambda: size)
    assert "".join(pieces) == text.lstrip() == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces), "a character came in parts"
    assert size < 8 or all(pieces[:-1]), "what is certain is not held back"


def test_special_tokens_are_shown_or_not() -> None:
    tokenizer = byte_level()
    ids = [*tokenizer("yes").input_ids, tokenizer.eos_token_id]
    assert "".join(pieces_of(tokenizer, ids)) == "yes<eos>"
    assert "".join(pieces_of(tokenizer, ids, skip_special_tokens=True)) == "yes"


class OwnDecode(PreTrainedTokenizerFast):
    """A class that decodes in its own way, as Whisper's."""

    def decode(self, token_ids: Any, **arguments: Any) -> str:
        return str(super().decode(token_ids, **arguments)).upper()


def test_a_tokenizer_of_another_make_is_asked_itself() -> None:
    plain = byte_level()
    own = OwnDecode(tokenizer_object=plain.backend_tokenizer, eos_token="<eos>")
    ids = plain("grüße").input_ids
    assert "".join(pieces_of(own, ids)) == "GRÜSSE" != plain.decode(ids)
    assert "".join(pieces_of(Counting(plain), ids)) == "grüße"


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
def test_a_text_that_ends_within_a_character(name: str) -> None:
    tokenizer = MAKERS[name]()
    ids = tokenizer("ok 你好👩", add_special_tokens=False).input_ids
    for end in range(len(ids)):
        assert "".join(pieces_of(tokenizer, ids[:end])) == tokenizer.decode(ids[:end])


def test_bytes_that_are_no_text_do_not_stall_the_stream() -> None:
    tokenizer = byte_level()
    rubbish = tokenizer("👩").input_ids[:1] * 30
    shown = [bool(piece) for piece in pieces_of(tokenizer, rubbish)]
    assert all(shown[5:-1])


class Counting:
    """Counts what is decoded."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.longest = tokenizer, 0

    def decode(self, ids: list[int], **arguments: Any) -> str:
        self.longest = max(self.longest, len(ids))
        return str(self.tokenizer.decode(ids, **arguments))

    def convert_ids_to_tokens(self, tokens: Any) -> Any:
        return self.tokenizer.convert_ids_to_tokens(tokens)

    def convert_tokens_to_ids(self, names: Any) -> Any:
        return self.tokenizer.convert_tokens_to_ids(names)


def test_a_token_costs_the_same_in_a_long_text(tokenizer: Any) -> None:
    counting = Counting(tokenizer)
    decoder = TextDecoder(counting)
    for token in tokenizer("is it really " * 300, add_special_tokens=False).input_ids:
        decoder.push(token)
    assert 0 < counting.longest <= 64


@pytest.mark.parametrize("size", [1, 8])
def test_bytes_that_are_no_text_make_the_window_no_longer(size: int) -> None:
    tokenizer = byte_level()
    counting = Counting(tokenizer)
    decoder = TextDecoder(counting)
    rubbish = tokenizer("👩").input_ids[:1] * 600
    pieces = [decoder.push(*rubbish[at : at + size]) for at in range(0, len(rubbish), size)]
    assert 0 < counting.longest <= 64
    assert "".join([*pieces, decoder.flush()]) == tokenizer.decode(rubbish)


def ended(ids: list[int], tokenizer: Any = None) -> GenerationHandle:
    handle = GenerationHandle("a", lambda handle: None)
    handle._tokenizer = tokenizer
    for token in ids:
        handle._push(token, None, 0.0)
    handle._finish("length")
    return handle


def test_a_handle_streams_text_to_threads_and_loops() -> None:
    tokenizer = byte_level()
    ids = tokenizer("Grüße 👩‍🚀").input_ids

    async def collect(handle: GenerationHandle) -> list[str]:
        return [piece async for piece in handle.text(tokenizer)]

    handle = ended(ids)
    pieces = list(handle.text(tokenizer))
    assert pieces == asyncio.run(collect(handle)) == list(ended(ids, tokenizer).text())
    assert pieces[:3] == ["G", "r", "ü"] and "" not in pieces
    stream = handle.text(tokenizer)
    assert list(stream) == list(stream), "each iterator begins with the first token"


def test_half_a_character_at_the_end_is_shown_as_decode_shows_it() -> None:
    tokenizer = byte_level()
    handle = ended(tokenizer("ok 👩").input_ids[:-1])
    assert "".join(handle.text(tokenizer)) == tokenizer.decode(handle.token_ids) == "ok \ufffd"


def test_an_error_comes_after_the_text() -> None:
    tokenizer = byte_level()
    handle = GenerationHandle("a", lambda handle: None)
    handle._push(tokenizer("x").input_ids[0], None, 0.0)
    handle._fail(ValueError("broken"))
    stream = iter(handle.text(tokenizer))
    assert next(stream) == "x"
    with pytest.raises(ValueError, match="broken"):
        next(stream)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"`tokenizer`.*GenerationManager"):
        ended([]).text()


def test_tokens_that_show_nothing_begin_no_window() -> None:
    """A decoder that drops the first space of a text would drop one in the middle."""
    tokenizer = byte_fallback()
    words = tokenizer("word and word " * 6, add_special_tokens=False).input_ids
    ids = [*words[:80], *[tokenizer.eos_token_id] * 14, *words]
    assert "".join(pieces_of(tokenizer, ids, skip_special_tokens=True)) == tokenizer.decode(
        ids, skip_special_tokens=True
    )
