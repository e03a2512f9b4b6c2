"""Whether a model is served exactly: ragged prompts in one batch against plain `generate`, one prompt at a time."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from hf_async_batching.config import BatchingConfig
from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.manager import GenerationManager

Status = Literal["exact", "refused", "wrong", "no reference", "not built", "failed"]

NEW_TOKENS = 12
# Ragged, on both sides of a page; the last but one joins late, and the last begins like one that was served before.
LENGTHS = (5, 37, 1, 23, 14, 40)
_LATE = 4
_PAGE_SIZE = 16
# Of log-probabilities in float32; the sums of a batch run in another order.
_TOLERANCE = 2e-3


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found.

    Attributes:
        status: "exact": every token and log-probability is `generate`'s. "refused": the model is not served, by an
            error that says why. "wrong": served with other tokens or log-probabilities. "no reference": plain
            `generate` fails, or says the same token over and over. "not built": no tiny model could be made. "failed":
            the check itself did not come to its end.
        reason: Why not exact; empty where it is.
        route: How the model is served (`ModelForward.route`); empty where it is not.
        distinct_tokens: Different tokens among those that `generate` made: with very few, nothing is shown.
    """

    status: Status
    reason: str = ""
    route: str = ""
    distinct_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Reference:
    """What plain `generate` says to the prompts, each alone.

    Attributes:
        prompts: Token ids.
        tokens: New tokens per prompt.
        logprobs: Their log-probabilities.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]

    @property
    def distinct_tokens(self) -> int:
        """Different tokens in all completions."""
        return len({token for tokens in self.tokens for token in tokens})


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
        fresh: Give each prompt a copy of the model of its own. Some families leave a state behind in their modules,
            on which what they say to the next prompt depends.

    Raises:
        Exception: Whatever `generate` raises.
    """
    all_tokens, all_logprobs = [], []
    for prompt in prompts:
        generator: Any = copy.deepcopy(model) if fresh else model
        ids = torch.tensor([prompt], device=next(model.parameters()).device)
        out = generator.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = out.sequences[0, len(prompt) :]
        logits = torch.cat(out.logits).float().log_softmax(-1)
        all_tokens.append(tokens.tolist())
        all_logprobs.append(logits.gather(1, tokens[:, None].to(logits.device))[:, 0].tolist())
    return Reference(prompts, all_tokens, all_logprobs)


def check_model(
    model: PreTrainedModel,
    known: Reference | None = None,
    *,
    new_tokens: int = NEW_TOKENS,
    config: BatchingConfig | None = None,
) -> Verdict:
    """Serve ragged prompts together, one of them late, and compare with plain `generate`.

    Args:
        model: A causal language model; its outputs are exact in float32 only.
        known: What `generate` says; computed where None.
        new_tokens: Tokens per prompt.
        config: Settings; small ones where None, with which prompts are computed in pieces.
    """
    if known is None:
        vocab = model.config.get_text_config().vocab_size
        try:
            known = reference(model, make_prompts(vocab), new_tokens)
        except Exception as error:
            return Verdict("no reference", f"plain `generate` raises {_line(error)}")
    settings = config or BatchingConfig(
        page_size=_PAGE_SIZE, max_batch_tokens=24, max_rows=4, max_sequence_length=64, depth=2, debug=True
    )
    distinct = known.distinct_tokens
    try:
        with GenerationManager(model, settings) as manager:
            arguments: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}
            arguments |= {"eos_token_id": None, "logprobs": True}
            handles = [manager.submit(prompt, **arguments) for prompt in known.prompts[:_LATE]]
            list(itertools.islice(handles[0], 3))
            handles += [manager.submit(prompt, **arguments) for prompt in known.prompts[_LATE:-1]]
            handles[1].result(600)
            handles += [manager.submit(known.prompts[-1], **arguments)]
            results = [handle.result(600) for handle in handles]
            assembly = manager.assembly
            route = str(getattr(assembly.forward, "route", "packed")) if assembly is not None else ""
    except UnsupportedModelError as error:
        return Verdict("refused", _line(error, named=False), "", distinct)
    for index, result in enumerate(results):
        got, want = list(result.token_ids), known.tokens[index]
        assert result.logprobs is not None
        differs_at = next((i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b), None)
        shown = f"prompt {index} of {len(known.prompts[index])} tokens"
        if differs_at is not None:
            return Verdict("wrong", f"{shown}: token {differs_at} differs", route, distinct)
        differences = [abs(a - b) for a, b in zip(result.logprobs, known.logprobs[index], strict=True)]
        # NaN compares as false.
        if not max(differences) <= _TOLERANCE:
            return Verdict("wrong", f"{shown}: log-probabilities differ by {max(differences):.2g}", route, distinct)
    return Verdict("exact", "", route, distinct)


def _line(error: BaseException, named: bool = True) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if named else text
