"""Run plain `generate` on each prompt alone: by its own choice of tokens, or with given tokens."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel

from hf_async_batching.model.foreign_kernels.reference_kernels import use_reference_kernels

NEW_TOKENS = 12
LENGTHS = (5, 37, 1, 23, 14, 40)
"""Lengths around page boundaries; the last prompt but one joins late, the last starts like one served before."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Results of plain `generate` for each prompt alone.

    Attributes:
        prompts: Token ids.
        tokens: New tokens per prompt.
        logprobs: Log-probabilities of the new tokens.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]

    @property
    def distinct_tokens(self) -> int:
        """Number of different tokens in all completions."""
        return len({token for tokens in self.tokens for token in tokens})


@dataclass(frozen=True, slots=True)
class Forced:
    """Results of plain `generate` if it has to generate given tokens.

    Attributes:
        logprobs: Log-probabilities of the given tokens.
        best: Log-probabilities of its own choice at each place.
    """

    logprobs: list[float]
    best: list[float]


def exact_reference(model: PreTrainedModel) -> PreTrainedModel:
    """The model whose `generate` is the reference: in float32, one without kernels of other packages.

    The chunked kernels of flash-linear-attention multiply float32 numbers in TF32, with ten bits of their mantissas.
    That changes log-probabilities of tiny models by up to 0.004, which is more than the tolerance in float32.

    Args:
        model: A model of any dtype.

    Returns:
        In float32 a copy that computes with transformers' torch code; in any other dtype the model itself.
    """
    if model.dtype != torch.float32:
        return model
    plain = copy.deepcopy(model)
    use_reference_kernels(plain)
    return plain


def make_prompts(vocab_size: int, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths from random tokens above 3; the last one begins with the second."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    low = min(4, vocab_size - 1)
    prompts = [torch.randint(low, vocab_size, (n,), generator=generator, device="cpu").tolist() for n in lengths]
    shared = min(len(prompts[1]) - 1, len(prompts[-1]) - 1)
    prompts[-1][:shared] = prompts[1][:shared]
    return prompts


def reference(
    model: PreTrainedModel, prompts: list[list[int]], new_tokens: int = NEW_TOKENS, *, fresh: bool = False
) -> Reference:
    """Run plain `model.generate` on each prompt alone, greedily, without an end-of-sequence token.

    Args:
        model: A causal language model.
        prompts: Token ids.
        new_tokens: Tokens per prompt.
        fresh: Give each prompt its own copy of the model. Some families keep state in their modules that changes the
            results for the next prompt.

    Raises:
        Exception: Any error of `generate`.
    """
    all_tokens, all_logprobs = [], []
    for prompt in prompts:
        tokens, scores = _generate(copy.deepcopy(model) if fresh else model, prompt, new_tokens)
        all_tokens.append(tokens.tolist())
        all_logprobs.append(scores.gather(1, tokens[:, None])[:, 0].tolist())
    return Reference(prompts, all_tokens, all_logprobs)


def forced(model: PreTrainedModel, prompt: list[int], tokens: list[int], *, fresh: bool = False) -> Forced:
    """Run plain `model.generate` on a prompt and force it to generate `tokens`, step by step.

    Args:
        model: A causal language model.
        prompt: Token ids.
        tokens: New tokens.
        fresh: Use a copy of the model; see `reference`.

    Raises:
        Exception: Any error of `generate`.
    """
    said, scores = _generate(
        copy.deepcopy(model) if fresh else model, prompt, len(tokens), logits_processor=[_Say(len(prompt), tokens)]
    )
    return Forced(scores.gather(1, said[:, None])[:, 0].tolist(), scores.max(-1).values.tolist())


class _Say(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Allows only the given token at each step."""

    def __init__(self, start: int, tokens: list[int]) -> None:
        self._start, self._tokens = start, tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen = torch.full_like(scores, float("-inf"))
        chosen[:, self._tokens[input_ids.shape[1] - self._start]] = 0
        return chosen  # type: ignore[return-value, unused-ignore]


def _generate(
    generator: Any, prompt: list[int], new_tokens: int, **arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens [n], and log-probabilities [n, vocab] in float32 or wider, on one device."""
    ids = torch.tensor([prompt], device=next(generator.parameters()).device)
    out = generator.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )
    scores = torch.cat(out.logits).float().log_softmax(-1)
    return out.sequences[0, len(prompt) :].to(scores.device), scores
