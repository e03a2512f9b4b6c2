"""Refuses what a prepared `GenerationConfig` asks for and nobody serves, by the table in `compatibility`."""

from __future__ import annotations

from transformers import GenerationConfig

from hf_async_batching.core.field_checks import check_length
from hf_async_batching.errors import UnsupportedArgumentError
from hf_async_batching.inputs.compatibility import FIELDS, ArgumentEntry

# Every field that the installed transformers knows; entries that a checkpoint adds on its own are nobody's arguments.
INSTALLED = tuple(name for name in vars(GenerationConfig()) if not name.startswith("_"))  # type: ignore[no-untyped-call]


_MOST_NGRAM_TOKENS = 1 << 26


def check_fields(config: GenerationConfig) -> None:
    """Refuse a prepared generation config whose fields ask for what is not served.

    Raises:
        UnsupportedArgumentError: Names the field and what to do.
        TypeError: A length is no number.
        ValueError: A length is not finite.
    """
    for name in ("max_length", "max_new_tokens"):
        if getattr(config, name, None) is not None:
            check_length(name, getattr(config, name))
    for name in INSTALLED:
        value = getattr(config, name, None)
        entry = FIELDS.get(name) or ArgumentEntry(name, "refused", "")
        if entry.status != "refused":
            continue
        if not any(value is neutral or (value == neutral and neutral is not None) for neutral in entry.neutral):
            raise UnsupportedArgumentError(f"`{name}={value!r}` is not served yet; {entry.remedy}")


def bound_encoder_ngrams(config: GenerationConfig, length: int) -> None:
    """Bound `encoder_no_repeat_ngram_size` by what a prompt of `length` tokens holds; `config` is changed.

    transformers makes a list of all n-grams. One that is longer than the prompt stands nowhere in it.

    Raises:
        UnsupportedArgumentError: The list would take the machine's memory.
    """
    size = config.encoder_no_repeat_ngram_size
    if not isinstance(size, int) or size <= 0:
        return
    if size > length:
        config.encoder_no_repeat_ngram_size = length + 1
    elif size * (length - size + 1) > _MOST_NGRAM_TOKENS:
        raise UnsupportedArgumentError(
            f"`encoder_no_repeat_ngram_size={size}` is not served for a prompt of {length} tokens: transformers would "
            "list all of its n-grams; pass a smaller size or a shorter prompt"
        )
