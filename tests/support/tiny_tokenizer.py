"""A tokenizer for the tiny models: their 97 tokens are letters and pairs of letters, so that strings cross tokens."""

from __future__ import annotations

from string import ascii_lowercase
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support.tiny_models import VOCAB


def tiny_tokenizer() -> Any:
    """Byte-level BPE; ids 0 to 2 are special, 3 to 28 are letters, the others pairs."""
    special = ["<pad>", "<s>", "</s>"]
    pairs = [
        first + second
        for first in ascii_lowercase
        for second in ascii_lowercase
        if (ord(first) * 7 + ord(second)) % 9 == 0
    ]
    tokens = [*special, *ascii_lowercase, *pairs][:VOCAB]
    assert len(tokens) == VOCAB
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [(token[0], token[1]) for token in tokens[len(special) + 26 :]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
