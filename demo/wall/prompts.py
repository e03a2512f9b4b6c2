"""The first questions of a wall or of a comparison, as visitors write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..serving.settings import LONGEST_TEXT

_MOST_PROMPTS = 256
LONGEST_PROMPTS = 100_000


def read_prompts(text: str | Sequence[Any]) -> list[str]:
    """Return one prompt per line without empty lines. Text beyond `LONGEST_PROMPTS` characters is left out."""
    lines = text[:LONGEST_PROMPTS].splitlines() if isinstance(text, str) else text
    prompts: list[str] = []
    length = 0
    for line in lines:
        prompt = line.strip()[:LONGEST_TEXT] if isinstance(line, str) else ""
        length += len(prompt)
        if len(prompts) == _MOST_PROMPTS or length > LONGEST_PROMPTS:
            break
        if prompt:
            prompts.append(prompt)
    return prompts
