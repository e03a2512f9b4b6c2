"""The settings of a visitor, and the request that they make."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.inputs.request_builder import eos_token_ids, new_request_id

if TYPE_CHECKING:
    from .models import ChatModel

MAX_NEW_TOKENS = 1024
LONGEST_TEXT = 20_000
_SEEDS = 2**31
MOST_SEED = _SEEDS - 1


class Bounds(NamedTuple):
    """The least and the most value of a number."""

    least: float
    most: float
    whole: bool = False


# The bounds of each setting, for the page's sliders, the API's checks and `Settings`.
BOUNDS = {
    "max_new_tokens": Bounds(1, MAX_NEW_TOKENS, whole=True),
    "temperature": Bounds(0.1, 2.0),
    "top_p": Bounds(0.05, 1.0),
    "top_k": Bounds(0, 1000, whole=True),
}


@dataclass(frozen=True)
class Settings:
    """The values of the page's controls.

    Attributes:
        system: System prompt; empty for none.
        max_new_tokens: Longest answer.
        temperature: Divides the logits.
        top_p: Keep the likeliest tokens up to this probability; 1 switches it off.
        top_k: Keep this many of the likeliest tokens; 0 switches it off.
        greedy: Always take the likeliest token; the other sampling settings are then ignored.
        seed: Makes a sampled answer reproducible; None draws a seed.
    """

    system: str = ""
    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    greedy: bool = False
    seed: int | None = None

    @classmethod
    def within_bounds(cls, *controls: Any, **named: Any) -> Settings:
        """Return the nearest valid settings to any values that a browser sent.

        Args:
            controls: Values in the order of `KNOBS`.
            named: Values by name. A missing value keeps its default.
        """
        asked = dict(zip(KNOBS, controls)) | named
        for name, (least, most, whole) in BOUNDS.items():
            if name in asked:
                asked[name] = clamp(asked[name], least, most)
                asked[name] = int(asked[name]) if whole else asked[name]
        asked["system"] = str(asked.get("system") or "")[:LONGEST_TEXT]
        asked["greedy"] = bool(asked.get("greedy"))
        asked["seed"] = read_seed(asked.get("seed"))
        return cls(**asked)

    @classmethod
    def checked(cls, **named: Any) -> Settings:
        """Return the settings that a client of the API sent.

        Raises:
            ValueError: A setting has another type or is out of bounds.
        """
        if not isinstance(named.get("system", ""), str):
            raise ValueError("`system` must be a text")
        for name, (least, most, whole) in BOUNDS.items():
            if name in named:
                (whole_number if whole else number)(name, named[name], least, most)
        if named.get("seed") is not None:
            whole_number("seed", named["seed"], 0, MOST_SEED)
        return cls.within_bounds(**named)

    def generate_arguments(self) -> dict[str, Any]:
        """Return these settings as arguments of `generate`, without system prompt and seed."""
        if self.greedy:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"max_new_tokens": self.max_new_tokens, **sampling}

    def request(self, prompt: Sequence[int], eos: tuple[int, ...]) -> Request:
        """Return the request for a prompt's token ids; `eos` are the tokens that end an answer."""
        seed = secrets.randbelow(_SEEDS) if self.seed is None else self.seed
        sampling = (
            SamplingParams()
            if self.greedy
            else SamplingParams(True, self.temperature, top_k=self.top_k, top_p=self.top_p, seed=seed)
        )
        return Request(new_request_id(), tuple(prompt), self.max_new_tokens, eos_token_ids=eos, sampling=sampling)


# The settings in the order of the page's controls.
KNOBS = tuple(field.name for field in fields(Settings))


def ends_of(chat_model: ChatModel) -> tuple[int, ...]:
    """Return the tokens that end an answer of this model."""
    model: Any = chat_model.model
    ends = eos_token_ids(model.generation_config)
    own = chat_model.tokenizer.eos_token_id
    return ends or ((int(own),) if isinstance(own, int) else ())


def read_seed(value: Any) -> int | None:
    """Return the seed that a browser sent; None, which draws a seed, if the box is empty or holds no number."""
    try:
        seed = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(clamp(seed, 0, MOST_SEED)) if seed == seed else None


def whole_number(name: str, value: Any, least: float, most: float) -> int:
    """Return a number that a client sent for an argument.

    Raises:
        ValueError: The value is not a whole number from `least` to `most`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"`{name}` must be a number from {least} to {most}, got {shown(value)}")
    if value != int(value):
        raise ValueError(f"`{name}` must be a whole number from {least} to {most}, got {shown(value)}")
    return int(value)


def number(name: str, value: Any, least: float, most: float) -> float:
    """Return a number that a client sent for an argument.

    Raises:
        ValueError: The value is not a number from `least` to `most`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"`{name}` must be a number from {least} to {most}, got {shown(value)}")
    return float(value)


def clamp(value: Any, least: float, most: float) -> float:
    """Return the nearest number within bounds; a value that is not a number becomes the least."""
    try:
        asked = float(value or 0)
    except (TypeError, ValueError, OverflowError):
        return least
    return min(max(asked, least), most) if asked == asked else least


def shown(value: Any) -> str:
    """Return the start of what a client sent, for a message."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__}"
    # Writing the digits of a long integer takes quadratic time.
    if isinstance(value, int) and value.bit_length() > 1000:
        return "a huge integer"
    return repr(value if not isinstance(value, str) else value[:80])
