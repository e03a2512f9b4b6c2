"""Choose tokens from logits for a whole batch, each row by its own parameters, without reading anything back.

Draws use the Gumbel-max trick in its exponential form: the arg-min of E_i / p_i with E_i ~ Exp(1) is a draw from p.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from hf_async_batching.core import row_layout
from hf_async_batching.core.logits_params import Stage
from hf_async_batching.core.plan import Features
from hf_async_batching.errors import InvalidProbabilitiesError
from hf_async_batching.runtime.triton_start import runs_triton
from hf_async_batching.sampling import gumbel
from hf_async_batching.sampling.argmax import argmax
from hf_async_batching.sampling.filters import filtered
from hf_async_batching.sampling.logits_processors import changed, without_early_eos
from hf_async_batching.sampling.metadata import SamplingMetadata
from hf_async_batching.sampling.outcome_marks import marked, tokens_of


class Sampler:
    """Chooses the next tokens of a step.

    Args:
        fused: Whether the Triton kernels do the work that they support; None for CUDA with Triton.
    """

    def __init__(self, fused: bool | None = None) -> None:
        self._fused = fused

    def as_run(self, features: Features) -> Features:
        """Remove features that make no difference to the work, so that more steps share a graph.

        The kernels read each row's filters, and ignore the number of candidates.
        """
        return _without_candidates(features) if self._fused else features

    def __call__(
        self, logits: torch.Tensor, rows: SamplingMetadata | None, features: Features
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Choose one token per row.

        Args:
            logits: [rows, vocab], any float dtype; not changed.
            rows: Parameters of the rows; None if the features need only the arg-max.
            features: Needs of the rows together.

        Returns:
            Outcomes int32 [rows] (see `outcomes`). Log-probabilities float32 [rows] of the tokens under the unfiltered
            logits if `features.logprobs` is set, else None.
        """
        if features.sampling or features.min_length or features.penalty:
            assert rows is not None
            chosen = self._choose_usual(logits, rows, features)
        else:
            chosen = argmax(logits)
        return chosen, log_probabilities(logits, tokens_of(chosen)) if features.logprobs else None

    def _choose_usual(self, logits: torch.Tensor, rows: SamplingMetadata, features: Features) -> torch.Tensor:
        if self._fused is None:
            self._fused = runs_triton(logits.device)
        if self._fused and (features.sampling or features.penalty):
            from hf_async_batching.sampling import triton_sampler as fused

            if fused.serves(features):
                if features.min_length:
                    logits = without_early_eos(logits, rows.params, rows.positions)
                return fused.choose(logits, rows, features)
        return self.choose(self.scores(logits, rows, features), rows, features, logits)

    def scores(self, logits: torch.Tensor, rows: SamplingMetadata, features: Features) -> torch.Tensor:
        """Compute the scores from which tokens are chosen, after all changes and filters.

        Args:
            logits: [rows, vocab], any float dtype; not changed.
            rows: Parameters of the rows.
            features: Needs of the rows together.

        Returns:
            float32 [rows, vocab]; for rows that draw, log-probabilities up to a shift.
        """
        scores = changed(logits.float(), rows, features)
        if features.sampling:
            drawing = rows.integers(row_layout.DO_SAMPLE) > 0
            scores = torch.where(drawing, filtered(scores, rows, features), scores)
        if features.stages & Stage.RENORMALIZE:
            scores = torch.where(rows.integers(row_layout.RENORMALIZE) > 0, scores.log_softmax(-1), scores)
        return scores

    def choose(
        self, scores: torch.Tensor, rows: SamplingMetadata, features: Features, logits: torch.Tensor
    ) -> torch.Tensor:
        """Choose one token per row: the best, or a draw.

        Args:
            scores: float32 [rows, vocab].
            rows: Parameters of the rows.
            features: Needs of the rows together.
            logits: [rows, vocab], the model's own logits.

        Returns:
            int32 [rows], outcomes. If the largest score of a row is not finite, the row draws no token, as in
            `generate`.
        """
        best = argmax(scores)
        tokens, undrawable = tokens_of(best), None
        if features.sampling:
            # The largest score is already 0, unless a filter has dropped it or the scores were never shifted.
            if features.scores or features.stages & Stage.TYPICAL:
                scores = scores - scores.amax(-1, keepdim=True)
            exponential = gumbel.exponential(rows.params, rows.positions, scores.shape[1])
            drawn = (scores - exponential.log_()).argmax(-1).int()
            drawing = rows.params[:, row_layout.DO_SAMPLE] > 0
            tokens, undrawable = torch.where(drawing, drawn, tokens), drawing & (best < 0)
        return marked(tokens, undrawable=undrawable, unsound=~logits.amax(-1).isfinite())


@functools.lru_cache(256)
def _without_candidates(features: Features) -> Features:
    from hf_async_batching.sampling import triton_sampler as fused

    return replace(features, candidates=0) if fused.serves(features) else features


def log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities float32 [rows] of tokens under logits [rows, vocab]."""
    scores = logits.float()
    return scores.gather(1, tokens[:, None].long())[:, 0] - scores.logsumexp(-1)


def draw(scores: torch.Tensor, records: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Draw one token int64 [rows] per row of scores float32 [rows, vocab], as the engine's steps draw it.

    Args:
        scores: Log-probabilities to draw from, up to a shift.
        records: int32 [rows, PARAMS]; only the seeds are read, see `seed_records`.
        positions: int32 [rows], positions of the drawn tokens.

    Raises:
        InvalidProbabilitiesError: No token can be drawn; a `RuntimeError`, as in `generate`.
    """
    largest = scores.amax(-1, keepdim=True)
    if not bool(largest.isfinite().all()):
        raise InvalidProbabilitiesError(
            "probability tensor contains either `inf`, `nan` or element < 0: the scores of a row, after its "
            "`logits_processor`s, leave no token to draw"
        )
    exponential = gumbel.exponential(records, positions, scores.shape[1])
    return (scores - largest - exponential.log_()).argmax(-1)


def seed_records(seeds: list[int], device: torch.device) -> torch.Tensor:
    """int32 [rows, PARAMS], records that hold only seeds."""
    records = torch.zeros(len(seeds), row_layout.PARAMS, dtype=torch.int32, device="cpu")
    halves = torch.tensor(seeds, dtype=torch.int64, device="cpu").view(torch.int32).view(-1, 2)
    records[:, row_layout.SEED_LOW], records[:, row_layout.SEED_HIGH] = halves[:, 0], halves[:, 1]
    return records.to(device)
