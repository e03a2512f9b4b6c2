"""Compute the parity check's reference logits with plain `generate`, and check that the model's tokens are causal."""

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

# Several pages of the usual size. The second and third prompt have equal length, so they share steps in every route.
_FIRST_LENGTH, _SECOND_LENGTH = 69, 37

Forward = PackedForward | CacheForward


class Prompts(NamedTuple):
    """Token ids. The last token of `second` and `third`, and the last two of `first`, are decoded."""

    first: list[int]
    second: list[int]
    third: list[int]

    @property
    def chunk(self) -> int:
        """Length of the first chunk of `first`, in tokens, if it is computed in chunks."""
        return len(self.first) // 3


class Expected(NamedTuple):
    """The reference results of a check.

    Attributes:
        logits: Logits, float32 [vocab], by label.
        noise: Difference that rounding alone makes: relative norm of the difference between logits computed token by
            token and all at once; 0 if it was not measured.
    """

    logits: dict[str, torch.Tensor]
    noise: float


def prompts_for(model: PreTrainedModel, vocab_size: int) -> Prompts:
    """Prompts of the default lengths, or shorter ones for a model with a short context.

    If attention selects the best keys (DeepSeek's sparse attention), the prompts must be long enough for it to leave
    some keys out: some families select different keys for a token if it is computed alone and with others at once.
    """
    picked = getattr(model.config.get_text_config(), "index_topk", None)
    length = max(_FIRST_LENGTH, picked + 5) if isinstance(picked, int) else _FIRST_LENGTH
    length = max(4, min(length, context_length(model) or length))
    return prompts_of_lengths(length, max(2, min(_SECOND_LENGTH, length // 2)), vocab_size)


def prompts_of_lengths(length: int, shorter: int, vocab_size: int) -> Prompts:
    """Prompts of given lengths: `length` for the first, `shorter` for the two others."""
    return Prompts(
        [(7 * i + 3) % vocab_size for i in range(length)],
        [(11 * i + 5) % vocab_size for i in range(shorter)],
        [(13 * i + 1) % vocab_size for i in range(shorter)],
    )


def reference_logits(view: PreTrainedModel, forward: Forward, prompts: Prompts, few: bool = True) -> Expected:
    """Compute the logits of each prompt alone with plain `generate`.

    Args:
        view: A view of the model that `prepare_view` has prepared.
        forward: The forward that is checked.
        prompts: Made by `prompts_for`.
        few: Allow a few forwards to stand for all, if the model computes all its decodes alike.

    Raises:
        UnsupportedModelError: A token changes the logits of tokens before it, or logits computed token by token and
            all at once differ: a request that gives up its pages could not be computed again. This is not checked if
            the route never computes a request again (`recomputes`).
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
    """Whether tokens in the second half of the first prompt are all computed alike.

    They are not if attention starts to leave out keys in that half, or if rotary frequencies follow the length: some
    families' own decode is right only up to such a length.
    """
    between = range(len(prompts.second) - 1, len(prompts.first) + 1)
    limits = length_thresholds(view.config).values()
    return not any(value in between for value in limits) and not batch_dependent_rope(view)


def _of_few_forwards(view: PreTrainedModel, forward: Forward, prompts: Prompts) -> dict[str, torch.Tensor] | None:
    """The logits of `first` from one forward, if they agree with a forward over its start and with two decodes.

    In a fresh process each forward takes tens of milliseconds, and attention over a new length as long again. So the
    start has the length of the other prompts.

    Returns:
        The logits by label; None if the model does not return logits of all positions.
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
    """Compute each prompt, then its decoded tokens one by one."""
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
    """Check that no token changes earlier logits, and that logits all at once agree with logits token by token.

    Returns:
        The relative norm of the difference between the two ways.
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
    """Check that rows of a batch agree with each row alone: code set on modules may treat them differently."""
    tokens = torch.tensor([prompts.second[:-1], prompts.third[:-1]], device=forward.device)
    logits: torch.Tensor = view(input_ids=tokens, return_dict=True).logits[:, -1].float()
    alone = torch.stack([want["a prompt that joined late"], want["another that joined late"]])
    difference = worst_relative_error(logits, alone)
    if not difference <= logits_tolerance(forward):
        raise UnsupportedModelError(
            f"{forward.name} is not served: a hook or a forward that was set on a module computes rows of a batch "
            f"differently from each row alone (its logits differ by {difference:.2g}, relative norm). Remove it, or "
            "use plain `model.generate`."
        )


def _refuse_above_tolerance(forward: Forward, *differences: float) -> None:
    tolerance = logits_tolerance(forward)
    above = [difference for difference in differences if not difference <= tolerance]
    if above:
        raise LogitsDifferError(
            f"{forward.name} is not served: its tokens change the logits of tokens before them, or its logits "
            f"computed token by token and all at once differ, by {above[0]:.2g} (relative norm, {forward.dtype}). Set "
            "`config.is_decoder = True` if the config has this field, or use plain `model.generate`.",
            f"its logits token by token and all at once differ by {above[0]:.2g} in {forward.dtype}",
            plain=True,
            finite=all(map(math.isfinite, above)),
        )


def _start(view: PreTrainedModel, forward: Forward, tokens: list[int], *, everywhere: bool = False) -> torch.Tensor:
    return GenerateLoop(view).start(_ids(forward, tokens), everywhere=everywhere).float()


def _ids(forward: Forward, tokens: list[int]) -> torch.Tensor:
    return torch.tensor([tokens], device=forward.device)
