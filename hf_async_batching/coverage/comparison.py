"""Whether tokens and log-probabilities are those of plain `generate`, as far as rounding lets one say.

In float32 the sums of a batch run in another order, on a CPU as on a GPU, and log-probabilities of tiny models differ
by some 1e-5 for it. A fixed tolerance is far above that, and far below what a wrong mask or position makes. In 16 bits
two right ways of computing differ by more, and by how much depends on the model. The measure is the difference between
plain `generate` in 16 bits and plain `generate` in float32 with the same weights, after the same tokens.
"""

from __future__ import annotations

import copy
from itertools import starmap

import torch
from transformers import PreTrainedModel

from hf_async_batching.coverage.plain_reference import Forced, Reference, forced
from hf_async_batching.coverage.verdicts import Finding

FLOAT32_TOLERANCE = 2e-3
# Of log-probabilities. The reference and the engine are each as far from float32 as rounding makes them, in other
# directions, and the largest of a hundred differences is not the largest of all.
_ROUNDINGS = 4.0
# Rounding may be less by chance; the last bit of a bfloat16 logit of 8 to 16 is 0.06.
_LEAST_16_BIT_TOLERANCE = 0.06


class Comparison:
    """Compares what an engine said with what plain `generate` says.

    Args:
        model: The model of the reference.
        known: What it says by its own choice.
        fresh: See `reference`.

    Attributes:
        known: The same.

    Raises:
        Exception: In 16 bits, whatever `generate` raises with the weights in float32.
    """

    def __init__(self, model: PreTrainedModel, known: Reference, *, fresh: bool = False) -> None:
        self.known = known
        self._model, self._fresh = model, fresh
        self._forced: dict[tuple[int, tuple[int, ...], bool], Forced] = {}
        self._rounding = 0.0
        self._wide: PreTrainedModel | None = None
        if model.dtype in (torch.float16, torch.bfloat16):
            # The weights as rounded, the sums in float32.
            self._wide = copy.deepcopy(model).to(torch.float32)  # type: ignore[arg-type]
            for index, (tokens, logprobs) in enumerate(zip(known.tokens, known.logprobs, strict=True)):
                self._widen(index, tokens, logprobs)

    @property
    def tolerance(self) -> float:
        """By how much rounding can make a log-probability differ."""
        if self._wide is None:
            return FLOAT32_TOLERANCE
        return max(_LEAST_16_BIT_TOLERANCE, _ROUNDINGS * self._rounding)

    def __call__(self, tokens: list[list[int]], logprobs: list[list[float]]) -> Finding:
        """Compare.

        Args:
            tokens: New tokens per prompt.
            logprobs: Their log-probabilities.
        """
        count = sum(map(len, tokens))
        others, worst = 0, 0.0
        changed = sum(got != want for got, want in zip(tokens, self.known.tokens, strict=True))
        for index, (got, want) in enumerate(zip(tokens, self.known.tokens, strict=True)):
            shown = f"prompt {index} of {len(self.known.prompts[index])} tokens"
            if len(got) != len(want):
                return Finding("wrong", f"{shown}: {len(got)} tokens and not {len(want)}", count)
            expected = self.known.logprobs[index]
            if got != want:
                plain = self._say(index, got)
                self._widen(index, got, plain.logprobs)
                gaps = [best - own for best, own in zip(plain.best, plain.logprobs, strict=True)]
                others += sum(gap > 0 for gap in gaps)
                far = next((i for i, gap in enumerate(gaps) if not gap <= self.tolerance), None)
                if far is not None:
                    reason = f"{shown}: token {far} is less likely than `generate`'s by {gaps[far]:.2g}"
                    return Finding("wrong", self._with_tolerance(reason), count, others)
                expected = plain.logprobs
            differences = list(starmap(_difference, zip(logprobs[index], expected, strict=True)))
            # NaN compares as false.
            if not max(differences) <= self.tolerance:
                reason = f"{shown}: log-probabilities differ by {max(differences):.2g}"
                return Finding("wrong", self._with_tolerance(reason), count, others, max(differences))
            worst = max(worst, *differences)
        if not changed:
            return Finding("exact", "", count, 0, worst)
        reason = (
            f"{changed} of {len(tokens)} completions differ, {others} of {count} tokens are not the most likely after "
            f"those before them; log-probabilities differ by {worst:.2g} at most"
        )
        return Finding("within rounding", self._with_tolerance(reason), count, others, worst)

    def _say(self, index: int, tokens: list[int], wide: bool = False) -> Forced:
        key = index, tuple(tokens), wide
        if key not in self._forced:
            model = self._wide if wide and self._wide is not None else self._model
            self._forced[key] = forced(model, self.known.prompts[index], tokens, fresh=self._fresh)
        return self._forced[key]

    def _widen(self, index: int, tokens: list[int], logprobs: list[float]) -> None:
        """See by how much rounding changes plain `generate`'s own log-probabilities of these tokens."""
        if self._wide is None:
            return
        wide = self._say(index, tokens, wide=True).logprobs
        self._rounding = max(self._rounding, *starmap(_difference, zip(logprobs, wide, strict=True)))

    def _with_tolerance(self, reason: str) -> str:
        return reason if self._wide is None else f"{reason}, and rounding explains {self.tolerance:.2g}"


def _difference(one: float, other: float) -> float:
    return abs(one - other)
