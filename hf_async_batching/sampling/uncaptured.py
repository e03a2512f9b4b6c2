"""Sampling outside CUDA graphs: rare filters, scores, logits, and logits for a chooser outside the engine.

This code neither waits for the device nor runs a caller's code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_async_batching.core.plan import Plan
from hf_async_batching.sampling.metadata import SamplingMetadata
from hf_async_batching.sampling.outcome_marks import tokens_of
from hf_async_batching.sampling.sampler import Sampler, log_probabilities


@dataclass(slots=True)
class UncapturedOutputs:
    """Outputs of a step beyond its tokens.

    Attributes:
        scores: float32 [sampled, vocab], the scores from which tokens were chosen; None if no request wants them.
        logits: [sampled, vocab], the model's own logits; None if no request wants them.
        offered: float32 [offers, vocab], an ordinary tensor with its own memory; None if no chooser waits for logits.
    """

    scores: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    offered: torch.Tensor | None = None


def sample_uncaptured(
    sampler: Sampler, logits: torch.Tensor, rows: SamplingMetadata, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor | None, UncapturedOutputs]:
    """Choose a step's tokens.

    Args:
        sampler: Chooses the tokens.
        logits: [rows, vocab], the model's own logits; not changed.
        rows: Parameters and memories of the rows.
        plan: The step.

    Returns:
        Outcomes int32 [rows] (see `outcomes`), their log-probabilities if requested, and the other outputs.
    """
    features, outputs = plan.features, UncapturedOutputs()
    scores = sampler.scores(logits, rows, features)
    chosen = sampler.choose(scores, rows, features, logits)
    if features.scores:
        outputs.scores = scores
    if features.logits:
        outputs.logits = logits
    if plan.offers:
        outputs.offered = _copied(logits, [offer.sampled for offer in plan.offers])
    return chosen, log_probabilities(logits, tokens_of(chosen)) if features.logprobs else None, outputs


def _copied(logits: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """Copy lines of logits [sampled, vocab] to new float32 memory; `positions` ascend."""
    # Outside inference mode, inference tensors cannot take part in gradients or be written to.
    with torch.inference_mode(False):
        out = torch.empty(len(positions), logits.shape[1], dtype=torch.float32, device=logits.device)
    start = 0
    while start < len(positions):  # one copy per run of neighbours; an index tensor would be sent to the device
        stop = start + 1
        while stop < len(positions) and positions[stop] == positions[stop - 1] + 1:
            stop += 1
        out[start:stop].copy_(logits[positions[start] : positions[start] + stop - start])
        start = stop
    return out
