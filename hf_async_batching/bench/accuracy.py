"""Checks that the tokens of a measured run are those of the plain model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from hf_async_batching.bench.workloads import Workload
from hf_async_batching.core.request import Request
from hf_async_batching.model.forward.generate_loop import CACHE_NAMES

# Positions whose logits are in memory at once. For a vocabulary of 128K, 512 positions take 0.25 GiB in float32.
_SLICE = 512

# Completions are compared with plain generate up to this many new tokens.
_ALONE = 256

# Rounding does not explain a gap beyond this share of the largest logit. In another batch, every layer rounds
# differently.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How generated tokens compare with a teacher-forced plain forward of the same model.

    Attributes:
        requests: Requests checked.
        tokens: Tokens checked.
        distinct: Number of different tokens among them. A run with few different tokens proves little.
        argmax_percent: Tokens that are the plain forward's arg-max.
        largest_gap: Largest distance of a token's logit to that of the arg-max.
        tolerance: The largest gap that rounding in the model's dtype can explain.
        generate_equal: Completions equal to `model.generate` with one prompt, and how many were compared; only in
            float32.
    """

    requests: int
    tokens: int
    distinct: int
    argmax_percent: float
    largest_gap: float
    tolerance: float
    generate_equal: tuple[int, int] | None = None

    @property
    def holds(self) -> bool:
        """Whether every token is right, up to rounding."""
        same, compared = self.generate_equal or (0, 0)
        return self.largest_gap <= self.tolerance and same == compared

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        text = (
            f"{self.argmax_percent:.2f} % of {self.tokens} tokens ({self.distinct} different ones) are the plain "
            f"forward's arg-max; largest logit gap of the others {self.largest_gap:.3f}"
        )
        if self.generate_equal is not None:
            text += f"; {self.generate_equal[0]} of {self.generate_equal[1]} completions equal plain generate alone"
        return text if self.holds else f"{text}: WRONG, rounding explains a gap of {self.tolerance:.3f} at most"


@torch.inference_mode()
def teacher_forced(
    model: PreTrainedModel,
    requests: Sequence[Request],
    tokens: Mapping[str, Sequence[int]],
    *,
    slice_size: int = _SLICE,
) -> Accuracy:
    """Run the plain model over prompts and generated tokens, and compare each token with its arg-max.

    Args:
        model: The model that the tokens came from, with its own attention.
        requests: The requests whose tokens are checked.
        tokens: New tokens by request id.
        slice_size: Positions computed at once, over a cache of the earlier ones. It bounds the memory of the logits.
    """
    same = total = 0
    worst = largest = 0.0
    seen: set[int] = set()
    taken = inspect.signature(model.forward).parameters
    cache_name = next((name for name in CACHE_NAMES if name in taken), "past_key_values")
    for request in requests:
        new = tokens[request.request_id]
        # No generated token follows the last one, so it is no input.
        ids = torch.tensor([*request.prompt, *new], device=model.device)[None, :-1]
        wanted = torch.tensor(new, device=model.device)
        cache = {cache_name: DynamicCache(config=model.config)}
        for start in range(0, ids.shape[1], slice_size):
            # The position that predicts new token j is len(prompt) - 1 + j.
            first = start - (len(request.prompt) - 1)
            logits = model(ids[:, start : start + slice_size], use_cache=True, **cache).logits[0]
            logits = logits[max(0, -first) :].float()
            if not len(logits):
                continue
            chosen = wanted[max(0, first) :][: len(logits)]
            best = logits.max(-1).values
            gap = best - logits.gather(1, chosen[:, None])[:, 0]
            same += int((gap == 0).sum())
            worst = max(worst, float(gap.max()))
            largest = max(largest, float(logits.abs().max()))
        total += len(new)
        seen.update(new)
    tolerance = _TOLERANCE.get(model.dtype, 0.1) * largest
    return Accuracy(len(requests), total, len(seen), 100 * same / max(1, total), worst, tolerance)


def equal_to_generate(
    model: PreTrainedModel, requests: Sequence[Request], tokens: Mapping[str, Sequence[int]]
) -> tuple[int, int]:
    """Count completions equal to plain `model.generate` with one prompt, and all that were compared.

    Each completion is compared up to 256 new tokens.
    """
    same = 0
    for request in requests:
        count = min(request.max_new_tokens, _ALONE)
        ids = torch.tensor([request.prompt], device=model.device)
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        same += out[0, len(request.prompt) :].tolist() == list(tokens[request.request_id][:count])
    return same, len(requests)


def sample(workload: Workload, tokens: Mapping[str, Sequence[int]], count: int) -> list[Request]:
    """Pick up to `count` requests, spread over the workload.

    A conversation is represented by its last turn, whose prompt holds all earlier turns.
    """
    users = len(workload.first)
    count = min(count, users)
    chosen = []
    for index in range(count):
        request = workload.first[index * users // count]
        while (following := workload.after(request, tokens[request.request_id])) is not None:
            request = following
        chosen.append(request)
    return chosen


def equal_fraction(one: Sequence[Mapping[str, Sequence[int]]], other: Sequence[Mapping[str, Sequence[int]]]) -> float:
    """Return the share of completions, over all passes, that are equal token for token."""
    pairs = [(left[name], right.get(name)) for left, right in zip(one, other, strict=True) for name in left]
    return sum(left == right for left, right in pairs) / len(pairs)
