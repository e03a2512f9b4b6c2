"""Refuses what a prepared `GenerationConfig` asks for and nobody serves, by the table in `compatibility`."""

from __future__ import annotations

from transformers import GenerationConfig

from hf_async_batching.compatibility import FIELDS, Entry
from hf_async_batching.errors import UnsupportedArgumentError

# Every field that the installed transformers knows; entries that a checkpoint adds on its own are nobody's arguments.
INSTALLED = tuple(name for name in vars(GenerationConfig()) if not name.startswith("_"))  # type: ignore[no-untyped-call]


def check_fields(config: GenerationConfig) -> None:
    """Refuse a prepared generation config whose fields ask for what is not served.

    Raises:
        UnsupportedArgumentError: Names the field and what to do.
    """
    for name in INSTALLED:
        value = getattr(config, name, None)
        entry = FIELDS.get(name) or Entry(name, "refused", "")
        if entry.status != "refused":
            continue
        if not any(value is neutral or (value == neutral and neutral is not None) for neutral in entry.neutral):
            raise UnsupportedArgumentError(f"`{name}={value!r}` is not served yet; {entry.remedy}")
