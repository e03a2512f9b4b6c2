"""What plain `generate` computes for the prompts of the attach check, and whether its tokens are causal."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from hf_async_batching.checks.logits_tolerance import logits_tolerance
from hf_async_batching.errors import LogitsDifferError, UnsupportedModelError
from hf_async_batching.linear.rounding import relative_error, worst_relative_error
from hf_async_batching.model.forward.cache_forward import CacheForward
from hf_async_batching.model.forward.generate_loop import GenerateLoop
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.small.length_thresholds import length_thresholds
from hf_async_batching.model.view.model_view import batch_dependent_rope, context_length
from hf_async_batching.model.view.module_calls import has_replaced_forwards, runs_user_code

# Several pages of the usual size. The second and the third are of equal length, and share steps in every route.
_FIRST_LENGTH, _SECOND_LENGTH = 69, 37

Forward = PackedForward | CacheForward


class Prompts(NamedTuple):
    """Token ids; the last one of `second` and `third`, and the last two of `first`, are decoded."""

    first: list[int]
    second: list[int]
    third: list[int]

    @property
    def chunk(self) -> int:
        """Tokens of the first piece of `first`, where it comes in pieces."""
        return len(self.first) // 3


class Expected(NamedTuple):
    """What the engine must come to.

    Attributes:
        logits: float32 [vocab], by what they are for.
        noise: How much rounding alone changes: relative norm of the difference between the logits of tokens one by
            one and of all at once; 0 where it is not asked for.
    """

    logits: dict[str, torch.Tensor]
    noise: float


def prompts_for(model: PreTrainedModel, vocab_size: int) -> Prompts:
    """Prompts of the usual lengths, or shorter where a model's context is.

    Where attention picks the best keys of all (DeepSeek's sparse attention), it must be asked to leave some out: some
    families pick others for the same token at once and one by one.
    """
    picked = getattr(model.config.get_text_config(), "index_topk", None)
    length = max(_FIRST_LENGTH, picked + 5) if isinstance(picked, int) else _FIRST_LENGTH
    length = max(4, min(length, context_length(model) or length))
    return prompts_of_lengths(length, max(2, min(_SECOND_LENGTH, length // 2)), vocab_size)


def prompts_of_lengths(length: int, shorter: int, vocab_size: int) -> Prompts:
    """Prompts of these lengths: of the first, and of the two others."""
    return Prompts(
        [(7 * i + 3) % vocab_size for i in range(length)],
        [(11 * i + 5) % vocab_size for i in range(shorter)],
        [(13 * i + 1) % vocab_size for i in range(shorter)],
    )


def reference_logits(view: PreTrainedModel, forward: Forward, prompts: Prompts, few: bool = True) -> Expected:
    """The logits that plain `generate` computes, of each prompt alone.

    Args:
        view: A view of the model that went through `prepare_view`.
        forward: The forward that is checked.
        prompts: Made by `prompts_for`.
        few: Whether a few forwards may stand for all, where the model's decodes are alike.

    Raises:
        UnsupportedModelError: Tokens change the logits of tokens before them, or those of tokens one by one and of
            all at once differ: a request that gives up its pages could not be computed again. Not looked at where
            none ever does (`recomputes`).
    """
    expected: Expected | None = None
    if few and isinstance(forward, PackedForward) and _decodes_alike(view, prompts):
        found = _of_few_forwards(view, forward, prompts)
        if found is not None:
            expected = Expected(found, 0.0)
    if expected is None:
        logits = _one_by_one(view, forward, prompts)
        noise = _check_all_at_once(view, forward, logits, prompts) if forward.recomputes else 0.0
        expected = Expected(logits, noise)
    if runs_user_code(view) or has_replaced_forwards(view):
        _check_batch(view, forward, expected.logits, prompts)
    return expected


def _decodes_alike(view: PreTrainedModel, prompts: Prompts) -> bool:
    """Whether tokens behind half of the first prompt are computed as those at its end are.

    Not where attention begins to leave keys out in between, or rotary frequencies follow the length: there some
    families' own decode is right up to some length only.
    """
    between = range(len(prompts.second) - 1, len(prompts.first) + 1)
    limits = length_thresholds(view.config).values()
    return not any(value in between for value in limits) and not batch_dependent_rope(view)


def _of_few_forwards(view: PreTrainedModel, forward: Forward, prompts: Prompts) -> dict[str, torch.Tensor] | None:
    """The logits of `first` from one forward over all of it, once that agrees with its beginning and two decodes.

    In a fresh process each forward takes tens of milliseconds, and attention over a new length as much again: so the
    beginning is as long as the other prompts.

    Returns:
        The logits by what they are for; None where the model gives none for all positions.
    """
    first, second, third = prompts
    kept = len(second) - 1
    at_once = _start(view, forward, first, everywhere=True)
    if len(at_once) != len(first):
        return None
    loop = GenerateLoop(view)
    beginning = loop.start(_ids(forward, first[:kept]), everywhere=True).float()
    decodes = [loop.step(_ids(forward, [token])).float() for token in first[kept : kept + 2]]
    _refuse_above_tolerance(
        forward,
        worst_relative_error(at_once[:kept], beginning),
        *(relative_error(want, got) for want, got in zip(at_once[kept : kept + 2], decodes, strict=True)),
    )
    return {
        "a chunk of a prompt": at_once[prompts.chunk - 1],
        "the rest of a prompt": at_once[-3],
        "a decode alone": at_once[-2],
        "a decode": at_once[-1],
        **_late_prompts(view, forward, second, third),
    }


def _one_by_one(view: PreTrainedModel, forward: Forward, prompts: Prompts) -> dict[str, torch.Tensor]:
    """Each prompt, then token by token."""
    first, second, third = prompts
    found = {"a chunk of a prompt": _start(view, forward, first[: prompts.chunk])}
    loop = GenerateLoop(view)
    found["the rest of a prompt"] = loop.start(_ids(forward, first[:-2])).float()
    found["a decode alone"] = loop.step(_ids(forward, first[-2:-1])).float()
    found["a decode"] = loop.step(_ids(forward, first[-1:])).float()
    return found | _late_prompts(view, forward, second, third)


def _late_prompts(
    view: PreTrainedModel, forward: Forward, second: list[int], third: list[int]
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for prompt, joined, decoded in (
        (second, "a prompt that joined late", "a late decode"),
        (third, "another that joined late", "another late decode"),
    ):
        loop = GenerateLoop(view)
        found[joined] = loop.start(_ids(forward, prompt[:-1])).float()
        found[decoded] = loop.step(_ids(forward, prompt[-1:])).float()
    return found


def _check_all_at_once(
    view: PreTrainedModel, forward: Forward, want: dict[str, torch.Tensor], prompts: Prompts
) -> float:
    """That tokens do not change what came before them, and that all at once are as good as one by one.

    Returns:
        The difference between the two.
    """
    first = prompts.first
    kept = len(first) // 2
    other = first[:kept] + [(token + 1) % forward.vocab_size for token in first[kept:]]
    at_once, otherwise = (_start(view, forward, tokens, everywhere=True) for tokens in (first, other))
    decodes = (
        relative_error(at_once[-1], want["a decode"]),
        relative_error(_start(view, forward, prompts.second), want["a late decode"]),
    )
    changed = worst_relative_error(at_once[:kept], otherwise[:kept]) if len(at_once) == len(first) else 0.0
    _refuse_above_tolerance(forward, *decodes, changed)
    return max(decodes)


def _check_batch(view: PreTrainedModel, forward: Forward, want: dict[str, torch.Tensor], prompts: Prompts) -> None:
    """That rows of a batch are computed as each alone: code that was set on modules may treat them differently."""
    tokens = torch.tensor([prompts.second[:-1], prompts.third[:-1]], device=forward.device)
    logits: torch.Tensor = view(input_ids=tokens, return_dict=True).logits[:, -1].float()
    alone = torch.stack([want["a prompt that joined late"], want["another that joined late"]])
    difference = worst_relative_error(logits, alone)
    if not difference <= logits_tolerance(forward):
        raise UnsupportedModelError(
            f"{forward.name} is not served: a hook or a forward that was set on a module computes rows of a batch "
            f"otherwise than each alone (its logits differ by {difference:.2g}, relative norm). Remove it, or use "
            "plain `model.generate`."
        )


def _refuse_above_tolerance(forward: Forward, *differences: float) -> None:
    tolerance = logits_tolerance(forward)
    above = [difference for difference in differences if not difference <= tolerance]
    if above:
        raise LogitsDifferError(
            f"{forward.name} is not served: its tokens change the logits of tokens before them, or those after tokens "
            f"one by one and all at once differ, by {above[0]:.2g} (relative norm, {forward.dtype}). Set "
            "`config.is_decoder = True` if it has that, or use plain `model.generate`.",
            f"its logits of tokens one by one and all at once differ by {above[0]:.2g} in {forward.dtype}",
            plain=True,
            finite=all(map(math.isfinite, above)),
        )


def _start(view: PreTrainedModel, forward: Forward, tokens: list[int], *, everywhere: bool = False) -> torch.Tensor:
    return GenerateLoop(view).start(_ids(forward, tokens), everywhere=everywhere).float()


def _ids(forward: Forward, tokens: list[int]) -> torch.Tensor:
    return torch.tensor([tokens], device=forward.device)
