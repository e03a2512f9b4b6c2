"""Steps in which tokens are chosen by what cannot be captured: processors that are called, scores that are wanted.

Processors run on the engine's stream, behind the forward and in front of the choice. Nothing waits for the device
unless a processor does. As in `generate`, they get ordinary tensors and run without gradients, which they can turn on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_async_batching.plan import Call, Plan
from hf_async_batching.sampling.rows import SampledRows
from hf_async_batching.sampling.sampler import Sampler, log_probabilities


@dataclass(slots=True)
class RareOutputs:
    """What a step brings beyond tokens.

    Attributes:
        scores: float32 [sampled, vocab], what tokens were chosen by; None where nobody wants them.
        logits: [sampled, vocab], as the model made them; None where nobody wants them.
        failures: What processors raised, by sampled position.
    """

    scores: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    failures: dict[int, BaseException] = field(default_factory=dict)


def sample_rare(
    sampler: Sampler, logits: torch.Tensor, rows: SampledRows, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor | None, RareOutputs]:
    """Choose a step's tokens.

    Args:
        sampler: Does all but the calls.
        logits: [rows, vocab], as the model made them; not changed.
        rows: Their parameters and memories.
        plan: The step.

    Returns:
        Tokens int32 [rows], their log-probabilities where asked for, and the rest.
    """
    features, outputs = plan.features, RareOutputs()
    scores = sampler.scores(logits, rows, features)
    if plan.calls:
        scores = scores.clone()
    for call in plan.calls:
        try:
            scores[call.sampled] = _call(call, logits[call.sampled : call.sampled + 1], rows)[0]
        except BaseException as error:  # native code raises such, too: whatever it is, it is this request's alone
            outputs.failures[call.sampled] = error
    tokens = sampler.choose(scores, rows, features)
    if features.scores:
        outputs.scores = scores
    if features.logits:
        outputs.logits = logits
    return tokens.int(), log_probabilities(logits, tokens) if features.logprobs else None, outputs


def _call(call: Call, logits: torch.Tensor, rows: SampledRows) -> torch.Tensor:
    """What the processors of one request make of its logits [1, vocab]."""
    assert rows.memory is not None
    padding = len(call.request.padding)
    # Tensors of inference mode cannot take part in gradients or be written to outside of it.
    with torch.inference_mode(False), torch.no_grad():
        history = rows.memory.history(call.row, 0, padding + call.length)
        # A copy of its own, which a processor may write to.
        scores: torch.Tensor = call.request.processors(history, call.length, logits.to(torch.float32, copy=True))
    if scores.shape != logits.shape:
        raise ValueError(
            f"a `logits_processor` returned scores of shape {tuple(scores.shape)}, expected {tuple(logits.shape)}"
        )
    return scores
