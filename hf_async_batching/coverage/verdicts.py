"""The results of a check: per entry point and per class."""

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

LONGEST = 512
"""Length in tokens up to which prompts cross the thresholds at which a model's computation changes."""

BAD: frozenset[Status] = frozenset({"wrong", "failed", "crashed", "timed out"})
"""Statuses of a mistake: the model is served but not exactly, or it fails without a refusal."""
SERVED: frozenset[Status] = frozenset({"exact", "within rounding"})
UNFINISHED: frozenset[Status] = frozenset({"failed", "crashed", "timed out"})
"""Statuses after which the check itself may have failed: a resumed run checks these entries again."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one entry point.

    Attributes:
        status: "exact": every token is `generate`'s, and every log-probability is within the tolerance.
            "within rounding": some tokens differ, and each of them is, after the same tokens before it, as likely as
            `generate`'s token within the tolerance. In 16 bits also: few tokens are beyond the tolerance, and the same
            weights served in float32 are exact or within rounding. "refused": not served; an error says why.
            "wrong": served with other tokens or log-probabilities. "no reference": plain `generate` fails, or repeats
            one token. "not built": no tiny model could be made. "failed": an error that is not a refusal.
            "crashed": the process ended, or its device takes no more work. "timed out": the process was ended at its
            time limit.
        reason: Why the status is not "exact"; empty if it is.
        tokens: Number of compared tokens.
        other_tokens: Number of tokens that are not plain `generate`'s choice after the same tokens before them.
        difference: The largest difference of a log-probability; None if none was compared.
        beyond: Number of tokens that differ by more than the tolerance.
    """

    status: Status
    reason: str = ""
    tokens: int = 0
    other_tokens: int = 0
    difference: float | None = None
    beyond: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a check.

    Attributes:
        status: Status through `submit`; see `Finding`.
        reason: Why the status is not "exact"; empty if it is.
        route: How the model is served (`PackedForward.route`); empty if it is not served.
        distinct_tokens: Number of different tokens that `generate` made: very few of them prove nothing.
        drop_in: Finding through `model.generate(custom_generate=...)`, with one batch padded on the left.
        plain_padded: Result of plain `generate` for the same batch, compared with each prompt alone.
        not_reached: Config fields with a threshold, beyond which the computation changes, that no prompt crossed.
        tokens: Number of tokens compared through `submit`.
        other_tokens: See `Finding`; through `submit`.
        difference: See `Finding`; through `submit`.
        tolerance: Allowed difference of log-probabilities; None if none were compared.
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
        """The finding of the drop-in; if the drop-in was not tried, the reason for that."""
        return self.drop_in or Finding(self.status, self.reason)

    @property
    def exact(self) -> bool:
        """Whether both entry points are exact."""
        return self.status == self.generate.status == "exact"

    @property
    def served(self) -> bool:
        """Whether both entry points are exact or within rounding."""
        return self.status in SERVED and self.generate.status in SERVED


def describe(verdict: Verdict) -> str:
    """Describe a verdict in one line."""
    found = verdict.generate
    parts = [verdict.status, f"({verdict.route})" if verdict.route else "", verdict.reason]
    if found.status != verdict.status or found.reason != verdict.reason:
        parts += [f"through submit; {found.status} through generate", found.reason]
    if verdict.not_reached:
        parts.append(f"[no prompt went beyond {', '.join(verdict.not_reached)}]")
    return " ".join(part for part in parts if part)
