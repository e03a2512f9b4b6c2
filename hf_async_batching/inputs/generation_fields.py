"""Refuse fields of a prepared `GenerationConfig` that are not served, by the table in `compatibility`."""

from __future__ import annotations

from transformers import GenerationConfig

from hf_async_batching.core.field_checks import check_length
from hf_async_batching.errors import UnsupportedArgumentError
from hf_async_batching.inputs.compatibility import FIELDS, ArgumentEntry

# Every field of the installed transformers. Entries that a checkpoint adds are not arguments.
INSTALLED = tuple(name for name in vars(GenerationConfig()) if not name.startswith("_"))  # type: ignore[no-untyped-call]


_MOST_NGRAM_TOKENS = 1 << 26


def check_fields(config: GenerationConfig) -> None:
    """Refuse a prepared generation config with a field that is not served.

    Raises:
        UnsupportedArgumentError: The field is not served; the message names it and the remedy.
        TypeError: A length is not a number.
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
            raise UnsupportedArgumentError(f"`{name}={value!r}` is not served; {entry.remedy}")


def bound_encoder_ngrams(config: GenerationConfig, length: int) -> None:
    """Bound `encoder_no_repeat_ngram_size` by the length of the prompt, in tokens; `config` is changed.

    transformers lists all n-grams of the prompt. A longer n-gram does not occur in it.

    Raises:
        UnsupportedArgumentError: The list would need too much memory.
    """
    size = config.encoder_no_repeat_ngram_size
    if not isinstance(size, int):
        return
    if size > length:
        config.encoder_no_repeat_ngram_size = length + 1
    elif size * (length - size + 1) > _MOST_NGRAM_TOKENS:
        raise UnsupportedArgumentError(
            f"`encoder_no_repeat_ngram_size={size}` is not served for a prompt of {length} tokens: transformers would "
            "list all of its n-grams; pass a smaller size or a shorter prompt"
        )
