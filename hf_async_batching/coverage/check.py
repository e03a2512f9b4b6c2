"""Check whether a model is served exactly: prompts served together, against plain `generate` of each alone.

The prompts go through both entry points: through `submit`, and as one batch, padded on the left, through
`model.generate(custom_generate=hf_async_batching.generate)`.
"""

from __future__ import annotations

import copy
import itertools
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_async_batching.config import BatchingConfig
from hf_async_batching.coverage.comparison import Comparison
from hf_async_batching.coverage.plain_reference import LENGTHS, NEW_TOKENS, Reference, make_prompts, reference
from hf_async_batching.coverage.verdicts import LONGEST, SERVED, Finding, Padded, Verdict
from hf_async_batching.devices.failure import why_lost
from hf_async_batching.drop_in.generate import generate
from hf_async_batching.errors import RequestTooLongError, UnsupportedArgumentError, UnsupportedModelError
from hf_async_batching.manager import GenerationManager
from hf_async_batching.model.small.length_thresholds import length_thresholds

_LATE = 4
_PAGE_SIZE = 16
_SECONDS = 600.0
_PAD = 0

_Run = Callable[[GenerationManager, int, Comparison], Finding]
"""One entry point."""


def prompt_lengths(model: PreTrainedModel, longest: int = LONGEST) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Lengths of prompts that cross the thresholds at which a model's computation changes, up to `longest`.

    Returns:
        The lengths, and the names of the config fields whose thresholds no prompt crosses.
    """
    thresholds = length_thresholds(model.config)
    reached = [length for length in thresholds.values() if length + 2 <= longest]
    # One more threshold is crossed during decoding.
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
    compile: bool | None = None,
    compared: Comparison | None = None,
    report: Callable[[Verdict], object] | None = None,
) -> Verdict:
    """Serve prompts of several lengths together through both entry points, and compare with plain `generate`.

    One prompt joins late.

    Args:
        model: A causal language model, on any device; `Comparison` says how 16-bit models are compared.
        known: Results of plain `generate`; None to compute them.
        new_tokens: New tokens per prompt.
        longest: Length in tokens up to which prompts cross windows, chunks and similar; see `length_thresholds`.
        config: Settings; None for small ones, with which prompts are computed in pieces.
        compile: `BatchingConfig.compile` of the small settings.
        compared: Results of plain `generate`, and how to compare with them; None to make it from `known`.
        report: Called with the verdict so far after each entry point: the process may crash in the next.
    """
    lengths, not_reached = prompt_lengths(model, longest)
    if compared is not None:
        known = compared.known
    if known is None:
        vocab = model.config.get_text_config(decoder=True).vocab_size
        try:
            known = reference(model, make_prompts(vocab, lengths), new_tokens)
        except Exception as error:
            return Verdict("no reference", f"plain `generate` raises {_line(error)}")
    pages_per_row = -(-(max(map(len, known.prompts)) + new_tokens) // _PAGE_SIZE)
    settings = config or BatchingConfig(
        page_size=_PAGE_SIZE,
        max_batch_tokens=24,
        max_rows=4,
        num_pages=4 * pages_per_row,
        depth=2,
        compile=compile,
        debug=True,
    )
    try:
        compared = compared or Comparison(model, known)
    except Exception as error:
        return Verdict("no reference", f"plain `generate` with the weights in float32 raises {_line(error)}")

    def served(run: _Run) -> tuple[Finding, str]:
        def serve(model: PreTrainedModel, compared: Comparison) -> tuple[Finding, str]:
            return _serve(model, settings, run, new_tokens, compared)

        found, route = serve(model, compared)
        if compared.may_be_choices(found):
            found = _with_choices(compared, found, route, serve)
        return found, route

    submitted, route = served(_submit)
    verdict = Verdict(
        submitted.status,
        submitted.reason,
        route if submitted.tokens else "",
        known.distinct_tokens,
        not_reached=not_reached,
        tokens=submitted.tokens,
        other_tokens=submitted.other_tokens,
        difference=submitted.difference,
        tolerance=compared.tolerance,
        beyond=submitted.beyond,
    )
    if submitted.status == "crashed":
        return verdict
    if report is not None:
        report(verdict)
    verdict = replace(verdict, drop_in=served(_drop_in)[0], tolerance=compared.tolerance)
    if verdict.generate.status == "crashed":
        return verdict
    if report is not None:
        report(verdict)
    return replace(verdict, plain_padded=_plain_padded(model, known, new_tokens))


def _serve(
    model: PreTrainedModel, settings: BatchingConfig, run: _Run, new_tokens: int, compared: Comparison
) -> tuple[Finding, str]:
    """The finding of one entry point, and how the model was served; the latter is empty if it was not served."""
    device = next(model.parameters()).device
    route = ""
    try:
        with GenerationManager(model, settings) as manager:
            try:
                found = run(manager, new_tokens, compared)
            finally:
                if manager.assembly is not None:
                    route = str(getattr(manager.assembly.forward, "route", "packed"))
        return found, route
    except (UnsupportedModelError, UnsupportedArgumentError, RequestTooLongError) as error:
        return _lost(device) or Finding("refused", _line(error, named=False)), route
    except Exception as error:
        traceback.print_exc()
        return _lost(device) or Finding("failed", _line(error)), route


def _with_choices(
    compared: Comparison,
    found: Finding,
    route: str,
    serve: Callable[[PreTrainedModel, Comparison], tuple[Finding, str]],
) -> Finding:
    """Judge a 16-bit finding with few tokens beyond the tolerance by serving the same weights in float32."""
    try:
        wide, route_wide = serve(*compared.in_float32())
    except Exception as error:
        wide, route_wide = Finding("no reference", f"plain `generate` raises {_line(error)}"), route
    if wide.status == "crashed":
        return wide
    then = f"with the same weights in float32 it is {wide.status}"
    if wide.status in SERVED and route_wide == route:
        reason = f"{found.reason}: choices that one bit decides; {then}"
        return replace(found, status="within rounding", reason=reason)
    if wide.status in SERVED:
        then += f", served as {route_wide}"
    return replace(found, reason="; ".join(filter(None, (found.reason, then, wide.reason))))


def _submit(manager: GenerationManager, new_tokens: int, compared: Comparison) -> Finding:
    known = compared.known
    arguments: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}
    arguments |= {"eos_token_id": None, "logprobs": True}
    handles = [manager.submit(prompt, **arguments) for prompt in known.prompts[:_LATE]]
    list(itertools.islice(handles[0], 3))
    handles += [manager.submit(prompt, **arguments) for prompt in known.prompts[_LATE:-1]]
    handles[1].result(_SECONDS)
    handles += [manager.submit(known.prompts[-1], **arguments)]
    results = [handle.result(_SECONDS) for handle in handles]
    return compared(
        [list(result.token_ids) for result in results], [list(result.logprobs or ()) for result in results]
    )


def _drop_in(manager: GenerationManager, new_tokens: int, compared: Comparison) -> Finding:
    known = compared.known
    out = _generate_padded(manager.model, known, new_tokens, custom_generate=generate, manager=manager)
    tokens = out.sequences[:, max(map(len, known.prompts)) :]
    logprobs = (
        torch.stack(out.logits, 1).float().log_softmax(-1).gather(2, tokens[:, :, None].to(out.logits[0].device))
    )
    return compared(tokens.tolist(), logprobs[:, :, 0].tolist())


def _plain_padded(model: PreTrainedModel, known: Reference, new_tokens: int) -> Padded:
    """Compare the family's own batch of padded prompts with each prompt alone."""
    try:
        out = _generate_padded(copy.deepcopy(model), known, new_tokens)
        tokens = out.sequences[:, max(map(len, known.prompts)) :].tolist()
    except Exception:
        return "fails"
    return "the same" if tokens == known.tokens else "other tokens"


def _generate_padded(model: Any, known: Reference, new_tokens: int, **arguments: Any) -> Any:
    """Run `generate` on all prompts as one batch, padded on the left."""
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


def _lost(device: torch.device) -> Finding | None:
    """A finding if a kernel failed on the device, which then takes no more work from this process."""
    why = why_lost(device)
    return Finding("crashed", why) if why is not None else None


def _line(error: BaseException, named: bool = True) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if named else text
