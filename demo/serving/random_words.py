"""A tokenizer for models with random weights: it reads text byte by byte and writes meaningless words."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

START, END = "<|im_start|>", "<|im_end|>"
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
# How byte-level tokenizers write a space.
_SPACE = "\u0120"


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer with `vocab_size` tokens: 256 bytes, the two control tokens of a chat, and made-up words.

    Raises:
        ValueError: `vocab_size` is too small for the bytes and the control tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 2:
        raise ValueError(f"a tokenizer needs at least {len(alphabet) + 2} tokens, the model has {vocab_size}")
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    for index in range(len(alphabet), vocab_size - 2):
        vocabulary[f"{_SPACE}{_word(index - len(alphabet))}"] = index
    # Without merges the tokenizer never reads words: only a model that picks them writes them.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    fast: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerBase = fast(tokenizer_object=tokenizer, eos_token=END, chat_template=_TEMPLATE)
    return made


def _word(number: int) -> str:
    """Return a pronounceable word, different for every number."""
    syllables = []
    while True:
        number, vowel = divmod(number, len(_VOWELS))
        number, consonant = divmod(number, len(_CONSONANTS))
        syllables.append(_CONSONANTS[consonant] + _VOWELS[vowel])
        if not number:
            return "".join(reversed(syllables))
        number -= 1
