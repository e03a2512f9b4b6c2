"""A tokenizer for the tiny models: one token per printable character."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support.tiny_models import EOS, VOCAB

_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'][0] + '>' + message['content'] }}"
    "{% if not (loop.last and continue_final_message) %}{{ '|' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 2 are special, 3 to 96 the characters from "!" on; a space is an underscore."""
    characters = [chr(ord("!") + i) for i in range(VOCAB - 3)]
    vocab = {"[PAD]": 0, "[BOS]": 1, "[EOS]": EOS} | {c: i + 3 for i, c in enumerate(characters)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="_"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="_"
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
