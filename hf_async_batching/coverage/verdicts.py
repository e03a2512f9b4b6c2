"""What a check found: per way in, per class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal[
    "exact",
    "within rounding",
    "refused",
    "wrong",
    "no reference",
    "not built",
    "failed",
    "crashed",
    "timed out",
]
Padded = Literal["", "the same", "other tokens", "fails"]

BAD: frozenset[Status] = frozenset({"wrong", "failed", "crashed", "timed out"})
"""What must not be: neither right nor refused."""
SERVED: frozenset[Status] = frozenset({"exact", "within rounding"})
UNFINISHED: frozenset[Status] = frozenset({"failed", "crashed", "timed out"})
"""The check itself may have failed: a run that goes on tries these again."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one way in.

    Attributes:
        status: "exact": every token is `generate`'s, and every log-probability is, as far as rounding lets one say.
            "within rounding": some tokens are others, and each of these is, after the same tokens before it, as
            likely as `generate`'s as far as rounding lets one say. In 16 bits also: few tokens are beyond that, and
            the same weights are exact, or within rounding, where they are served in float32. "refused": not served, by
            an error that says why. "wrong": served with other tokens or log-probabilities. "no reference": plain
            `generate` fails, or says the same token over and over. "not built": no tiny model could be made.
            "failed": an error that is no refusal. "crashed": the process ended, or its device takes no more work.
            "timed out": the process was ended at its limit.
        reason: Why not exact; empty where it is.
        tokens: Tokens compared.
        other_tokens: Tokens that are not plain `generate`'s choice after the same tokens before them.
        difference: The largest difference of a log-probability; None where none was compared.
        beyond: Tokens that differ by more than the tolerance.
    """

    status: Status
    reason: str = ""
    tokens: int = 0
    other_tokens: int = 0
    difference: float | None = None
    beyond: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found.

    Attributes:
        status: Through `submit`; see `Finding`.
        reason: Why not exact; empty where it is.
        route: How the model is served (`PackedForward.route`); empty where it is not.
        distinct_tokens: Different tokens among those that `generate` made: with very few, nothing is shown.
        drop_in: Through `model.generate(custom_generate=...)`, with one batch that is padded on the left.
        plain_padded: What plain `generate` makes of the same batch, compared with each prompt alone.
        not_reached: Lengths at which the config makes the model compute otherwise, and beyond which no prompt went.
        tokens: Tokens compared through `submit`.
        other_tokens: See `Finding`; through `submit`.
        difference: See `Finding`; through `submit`.
        tolerance: By how much log-probabilities may differ; None where none were compared.
        beyond: See `Finding`; through `submit`.
    """

    status: Status
    reason: str = ""
    route: str = ""
    distinct_tokens: int = 0
    drop_in: Finding | None = None
    plain_padded: Padded = ""
    not_reached: tuple[str, ...] = ()
    tokens: int = 0
    other_tokens: int = 0
    difference: float | None = None
    tolerance: float | None = None
    beyond: int = 0

    @property
    def generate(self) -> Finding:
        """What came of the drop-in; where it was not tried, what kept the check from it."""
        return self.drop_in or Finding(self.status, self.reason)

    @property
    def exact(self) -> bool:
        """Whether both ways in are exact."""
        return self.status == self.generate.status == "exact"

    @property
    def served(self) -> bool:
        """Whether both ways in are exact, or as exact as rounding lets one say."""
        return self.status in SERVED and self.generate.status in SERVED


def describe(verdict: Verdict) -> str:
    """One line for a person."""
    found = verdict.generate
    parts = [verdict.status, f"({verdict.route})" if verdict.route else "", verdict.reason]
    if found.status != verdict.status or found.reason != verdict.reason:
        parts += [f"through submit; {found.status} through generate", found.reason]
    if verdict.not_reached:
        parts.append(f"[no prompt went beyond {', '.join(verdict.not_reached)}]")
    return " ".join(part for part in parts if part)
