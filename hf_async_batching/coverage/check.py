"""Whether a model is served exactly: ragged prompts together against plain `generate`, one prompt at a time.

The prompts go in both ways in: through `submit`, and as one batch, padded on the left, through
`model.generate(custom_generate=hf_async_batching.generate)`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from hf_async_batching.config import BatchingConfig
from hf_async_batching.drop_in import generate
from hf_async_batching.errors import RequestTooLongError, UnsupportedArgumentError, UnsupportedModelError
from hf_async_batching.length_thresholds import length_thresholds
from hf_async_batching.manager import GenerationManager

Status = Literal["exact", "refused", "wrong", "no reference", "not built", "failed"]
Padded = Literal["", "the same", "other tokens", "fails"]

NEW_TOKENS = 12
LENGTHS = (5, 37, 1, 23, 14, 40)
"""Ragged, on both sides of a page; the last but one joins late, the last begins like one that was served before."""
LONGEST = 512
"""Tokens up to which a prompt goes beyond the lengths at which a model's config makes it compute otherwise."""

_LATE = 4
_PAGE_SIZE = 16
# Of log-probabilities in float32; the sums of a batch run in another order.
_TOLERANCE = 2e-3
_SECONDS = 600.0
_PAD = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one way in.

    Attributes:
        status: "exact": every token and log-probability is `generate`'s. "refused": not served, by an error that
            says why. "wrong": served with other tokens or log-probabilities. "no reference": plain `generate` fails,
            or says the same token over and over. "not built": no tiny model could be made. "failed": an error that
            is no refusal, or the check itself did not come to its end.
        reason: Why not exact; empty where it is.
    """

    status: Status
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found.

    Attributes:
        status: Through `submit`; see `Finding`.
        reason: Why not exact; empty where it is.
        route: How the model is served (`ModelForward.route`); empty where it is not.
        distinct_tokens: Different tokens among those that `generate` made: with very few, nothing is shown.
        drop_in: Through `model.generate(custom_generate=...)`, with one batch that is padded on the left.
        plain_padded: What plain `generate` makes of the same batch, compared with each prompt alone.
        not_reached: Lengths at which the config makes the model compute otherwise, and beyond which no prompt went.
    """

    status: Status
    reason: str = ""
    route: str = ""
    distinct_tokens: int = 0
    drop_in: Finding | None = None
    plain_padded: Padded = ""
    not_reached: tuple[str, ...] = ()

    @property
    def generate(self) -> Finding:
        """What came of the drop-in; where it was not tried, what kept the check from it."""
        return self.drop_in or Finding(self.status, self.reason)

    @property
    def exact(self) -> bool:
        """Whether both ways in are exact."""
        return self.status == self.generate.status == "exact"


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


def prompt_lengths(model: PreTrainedModel, longest: int = LONGEST) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Lengths of prompts that go beyond the lengths at which a model computes otherwise, as far as `longest`.

    Returns:
        The lengths, and the names of the config's fields beyond whose lengths none goes.
    """
    thresholds = length_thresholds(model.config)
    reached = [length for length in thresholds.values() if length + 2 <= longest]
    # One more is crossed while it decodes.
    further = (
        (max(reached) + 2, max(1, max(reached) - NEW_TOKENS // 2)) if max(reached, default=0) > max(LENGTHS) else ()
    )
    names = tuple(sorted(name for name, length in thresholds.items() if length + 2 > longest))
    return (*LENGTHS[:2], *further, *LENGTHS[2:]), names


def check_model(
    model: PreTrainedModel,
    known: Reference | None = None,
    *,
    new_tokens: int = NEW_TOKENS,
    longest: int = LONGEST,
    config: BatchingConfig | None = None,
) -> Verdict:
    """Serve ragged prompts together, one of them late, in both ways in, and compare with plain `generate`.

    Args:
        model: A causal language model; its outputs are exact in float32 only.
        known: What `generate` says; computed where None.
        new_tokens: Tokens per prompt.
        longest: Tokens up to which prompts go beyond windows, chunks and the like; see `length_thresholds`.
        config: Settings; small ones where None, with which prompts are computed in pieces.
    """
    lengths, not_reached = prompt_lengths(model, longest)
    if known is None:
        vocab = model.config.get_text_config(decoder=True).vocab_size
        try:
            known = reference(model, make_prompts(vocab, lengths), new_tokens)
        except Exception as error:
            return Verdict("no reference", f"plain `generate` raises {_line(error)}")
    pages_per_row = -(-(max(map(len, known.prompts)) + new_tokens) // _PAGE_SIZE)
    settings = config or BatchingConfig(
        page_size=_PAGE_SIZE, max_batch_tokens=24, max_rows=4, num_pages=4 * pages_per_row, depth=2, debug=True
    )
    routes: list[str] = []

    def served(run: Callable[[GenerationManager, Reference, int], Finding]) -> Finding:
        try:
            with GenerationManager(model, settings) as manager:
                try:
                    return run(manager, known, new_tokens)
                finally:
                    if manager.assembly is not None:
                        routes.append(str(getattr(manager.assembly.forward, "route", "packed")))
        except (UnsupportedModelError, UnsupportedArgumentError, RequestTooLongError) as error:
            return Finding("refused", _line(error, named=False))
        except Exception as error:
            return Finding("failed", _line(error))

    submitted = served(_submit)
    drop_in = served(_drop_in)
    return Verdict(
        submitted.status,
        submitted.reason,
        routes[0] if routes and submitted.status in ("exact", "wrong") else "",
        known.distinct_tokens,
        drop_in,
        _plain_padded(model, known, new_tokens),
        not_reached,
    )


def _submit(manager: GenerationManager, known: Reference, new_tokens: int) -> Finding:
    arguments: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}
    arguments |= {"eos_token_id": None, "logprobs": True}
    handles = [manager.submit(prompt, **arguments) for prompt in known.prompts[:_LATE]]
    list(itertools.islice(handles[0], 3))
    handles += [manager.submit(prompt, **arguments) for prompt in known.prompts[_LATE:-1]]
    handles[1].result(_SECONDS)
    handles += [manager.submit(known.prompts[-1], **arguments)]
    results = [handle.result(_SECONDS) for handle in handles]
    return _compared(
        known, [list(result.token_ids) for result in results], [list(result.logprobs or ()) for result in results]
    )


def _drop_in(manager: GenerationManager, known: Reference, new_tokens: int) -> Finding:
    out = _generate_padded(manager.model, known, new_tokens, custom_generate=generate, manager=manager)
    tokens = out.sequences[:, max(map(len, known.prompts)) :]
    logprobs = (
        torch.stack(out.logits, 1).float().log_softmax(-1).gather(2, tokens[:, :, None].to(out.logits[0].device))
    )
    return _compared(known, tokens.tolist(), logprobs[:, :, 0].tolist())


def _plain_padded(model: PreTrainedModel, known: Reference, new_tokens: int) -> Padded:
    """Whether a family's own batch of padded prompts comes to what each prompt comes to alone."""
    try:
        out = _generate_padded(copy.deepcopy(model), known, new_tokens)
        tokens = out.sequences[:, max(map(len, known.prompts)) :].tolist()
    except Exception:
        return "fails"
    return "the same" if tokens == known.tokens else "other tokens"


def _generate_padded(model: Any, known: Reference, new_tokens: int, **arguments: Any) -> Any:
    """`generate` of all prompts as one batch, padded on the left."""
    longest = max(map(len, known.prompts))
    ids = torch.tensor([[_PAD] * (longest - len(prompt)) + prompt for prompt in known.prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in known.prompts])
    device = next(model.parameters()).device
    return model.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        pad_token_id=_PAD,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )


def _compared(known: Reference, tokens: list[list[int]], logprobs: list[list[float]]) -> Finding:
    for index, (got, want) in enumerate(zip(tokens, known.tokens, strict=True)):
        shown = f"prompt {index} of {len(known.prompts[index])} tokens"
        if len(got) != len(want):
            return Finding("wrong", f"{shown}: {len(got)} tokens and not {len(want)}")
        differs_at = next((i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b), None)
        if differs_at is not None:
            return Finding("wrong", f"{shown}: token {differs_at} differs")
        differences = [abs(a - b) for a, b in zip(logprobs[index], known.logprobs[index], strict=True)]
        # NaN compares as false.
        if not max(differences) <= _TOLERANCE:
            return Finding("wrong", f"{shown}: log-probabilities differ by {max(differences):.2g}")
    return Finding("exact")


def _line(error: BaseException, named: bool = True) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if named else text
