"""Compare tokens and log-probabilities with those of plain `generate`, as exactly as rounding allows.

In float32 a batch adds up its sums in another order, on a CPU as on a GPU. This changes log-probabilities of tiny
models by about 1e-5. A fixed tolerance is far above that, and far below the effect of a wrong mask or position. In 16
bits two right ways of computing differ more, and by how much depends on the model. The tolerance there comes from the
difference between plain `generate` in 16 bits and plain `generate` in float32 with the same weights, after the same
tokens.

If a router selects the best experts, one bit can change its choice, and a later token then differs by far more. The
plain model need not meet such a choice at the same token as the engine. So if few tokens are beyond the tolerance, the
same weights are served in float32: a mistake shows there too, and a choice of one bit does not.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import starmap

import torch
from transformers import PreTrainedModel

from hf_async_batching.coverage.plain_reference import Forced, Reference, forced, reference
from hf_async_batching.coverage.verdicts import Finding

FLOAT32_TOLERANCE = 2e-3
# Factor on the rounding of log-probabilities. Rounding moves the reference and the engine away from float32 in
# different directions, and the largest of a hundred measured differences is not the largest possible one.
_ROUNDINGS = 4.0
# Lower bound, because little rounding may be measured by chance; the last bit of a bfloat16 logit of 8 to 16 is 0.06.
_LEAST_16_BIT_TOLERANCE = 0.06
# Share of tokens that one-bit choices may put beyond the tolerance. A wrong mask affects most tokens.
_MOST_CHOICES = 0.05


@dataclass(frozen=True, slots=True)
class _Token:
    """How far a token is from plain `generate`'s token.

    Attributes:
        prompt: Index of the prompt.
        place: Index among the new tokens.
        gap: How much lower its log-probability is than that of `generate`'s choice after the same tokens.
        difference: Difference of its log-probability; infinite if it has none.
    """

    prompt: int
    place: int
    gap: float
    difference: float

    @property
    def size(self) -> float:
        """The larger of gap and difference."""
        return max(self.gap, self.difference)


class Comparison:
    """Compares an engine's results with those of plain `generate`.

    Args:
        model: The model of the reference.
        known: Its results by its own choice of tokens.
        fresh: See `reference`.

    Attributes:
        known: The argument.

    Raises:
        Exception: In 16 bits, any error of `generate` with the weights in float32.
    """

    def __init__(self, model: PreTrainedModel, known: Reference, *, fresh: bool = False) -> None:
        self.known = known
        self._model, self._fresh = model, fresh
        self._forced: dict[tuple[int, tuple[int, ...], bool], Forced] = {}
        self._rounding = 0.0
        self._wide: PreTrainedModel | None = None
        self._in_float32: Comparison | None = None
        if model.dtype in (torch.float16, torch.bfloat16):
            # The rounded weights, with sums in float32.
            self._wide = copy.deepcopy(model).to(torch.float32)  # type: ignore[arg-type]
            self._wide.config.dtype = torch.float32
            for index, (tokens, logprobs) in enumerate(zip(known.tokens, known.logprobs, strict=True)):
                self._widen(index, tokens, logprobs)

    @property
    def tolerance(self) -> float:
        """The largest difference of a log-probability that rounding can cause."""
        if self._wide is None:
            return FLOAT32_TOLERANCE
        return max(_LEAST_16_BIT_TOLERANCE, _ROUNDINGS * self._rounding)

    def __call__(self, tokens: list[list[int]], logprobs: list[list[float]]) -> Finding:
        """Compare an engine's tokens and log-probabilities with the reference.

        Args:
            tokens: New tokens per prompt.
            logprobs: Log-probabilities of these tokens.
        """
        count = sum(map(len, tokens))
        others = 0
        found: list[_Token] = []
        changed = sum(got != want for got, want in zip(tokens, self.known.tokens, strict=True))
        for index, (got, want) in enumerate(zip(tokens, self.known.tokens, strict=True)):
            if len(got) != len(want):
                shown = f"prompt {index} of {len(self.known.prompts[index])} tokens"
                return Finding("wrong", f"{shown}: {len(got)} tokens and not {len(want)}", count)
            expected, gaps = self.known.logprobs[index], [0.0] * len(got)
            if got != want:
                plain = self._say(index, got)
                self._widen(index, got, plain.logprobs)
                expected = plain.logprobs
                gaps = [_finite(best - own) for best, own in zip(plain.best, plain.logprobs, strict=True)]
                others += sum(gap > 0 for gap in gaps)
            differences = starmap(_difference, zip(logprobs[index], expected, strict=True))
            found += [_Token(index, place, *of) for place, of in enumerate(zip(gaps, differences, strict=True))]
        worst = max(each.difference for each in found)
        if beyond := [each for each in found if each.size > self.tolerance]:
            reason = self._beyond(beyond, count)
            return Finding("wrong", reason, count, others, worst, len(beyond))
        if not changed:
            return Finding("exact", "", count, 0, worst)
        reason = (
            f"{changed} of {len(tokens)} completions differ, {others} of {count} tokens are not the most likely after "
            f"those before them; log-probabilities differ by {worst:.2g} at most"
        )
        return Finding("within rounding", self._with_tolerance(reason), count, others, worst)

    def may_be_choices(self, found: Finding) -> bool:
        """Whether so few tokens are beyond the tolerance that one-bit choices may be the cause."""
        return (
            self._wide is not None
            and found.status == "wrong"
            and 0 < found.beyond <= _MOST_CHOICES * found.tokens
            and math.isfinite(found.difference or 0.0)
        )

    def in_float32(self) -> tuple[PreTrainedModel, Comparison]:
        """The same weights in float32, to be served, and a comparison with plain `generate` of these weights.

        Raises:
            ValueError: The model is in float32 already.
            Exception: Any error of `generate`.
        """
        if self._wide is None:
            raise ValueError("the model is in float32 already; compare with this object itself")
        # Serving may leave state in a model.
        model = copy.deepcopy(self._wide) if self._fresh else self._wide
        if self._in_float32 is None:
            known = reference(self._wide, self.known.prompts, len(self.known.tokens[0]), fresh=self._fresh)
            self._in_float32 = Comparison(self._wide, known, fresh=self._fresh)
        return model, self._in_float32

    def _beyond(self, tokens: list[_Token], count: int) -> str:
        worst = max(tokens, key=lambda token: token.size)
        how = (
            "is less likely than `generate`'s"
            if worst.gap > worst.difference
            else "has a log-probability that differs"
        )
        return (
            f"{len(tokens)} of {count} tokens beyond the tolerance of {self.tolerance:.2g}; the worst, token "
            f"{worst.place} of prompt {worst.prompt} ({len(self.known.prompts[worst.prompt])} tokens), {how} by "
            f"{worst.size:.2g}"
        )

    def _say(self, index: int, tokens: list[int], wide: bool = False) -> Forced:
        key = index, tuple(tokens), wide
        if key not in self._forced:
            model = self._wide if wide and self._wide is not None else self._model
            self._forced[key] = forced(model, self.known.prompts[index], tokens, fresh=self._fresh)
        return self._forced[key]

    def _widen(self, index: int, tokens: list[int], logprobs: list[float]) -> None:
        """Measure how much rounding changes plain `generate`'s own log-probabilities of these tokens."""
        if self._wide is None:
            return
        wide = self._say(index, tokens, wide=True).logprobs
        self._rounding = max(self._rounding, *starmap(_difference, zip(logprobs, wide, strict=True)))

    def _with_tolerance(self, reason: str) -> str:
        return reason if self._wide is None else f"{reason}, and rounding explains {self.tolerance:.2g}"


def _difference(one: float, other: float) -> float:
    return _finite(abs(one - other))


def _finite(value: float) -> float:
    """Turn NaN into infinity, because NaN compares as not large."""
    return math.inf if math.isnan(value) else value
