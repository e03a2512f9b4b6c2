"""Serve a `generate` call that transformers has prepared."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_async_batching.config import BatchingConfig
from hf_async_batching.core.request import Request
from hf_async_batching.drop_in.input_checks import check_mask, check_model_inputs
from hf_async_batching.drop_in.neutral_inputs import zeros_are_neutral
from hf_async_batching.drop_in.portions import submit_in_portions
from hf_async_batching.errors import ReentrantCallError, UnsupportedArgumentError
from hf_async_batching.handle import GenerationHandle
from hf_async_batching.host_decoding.batch_decoding import decode_batch
from hf_async_batching.host_decoding.logits_handle import LogitsHandle
from hf_async_batching.host_decoding.token_chooser import TokenChooser
from hf_async_batching.inputs.generation_fields import check_fields
from hf_async_batching.inputs.media_arguments import media_of, user_name
from hf_async_batching.inputs.prompts import Prompt
from hf_async_batching.inputs.request_builder import Seed, seeds_of_rows
from hf_async_batching.manager import GenerationManager
from hf_async_batching.model.view.model_view import refuse_unservable
from hf_async_batching.registry import get_manager
from hf_async_batching.runtime.default_device import cpu_by_default
from hf_async_batching.stopping.batch_scores import BatchScores, stack_steps
from hf_async_batching.stopping.batch_stepper import step_batch
from hf_async_batching.stopping.criteria import (
    CriteriaListChecker,
    HostStopChecker,
    StopChecker,
    StopConditions,
    check_ends,
    read_criteria,
    stop_string_criterion,
)

GenerateOutput = torch.Tensor | GenerateDecoderOnlyOutput


@dataclass(slots=True)
class CallSettings:
    """Arguments of a call that transformers does not prepare."""

    streamer: BaseStreamer | None
    tokenizer: Any
    stop_strings: str | list[str] | None
    seed: Seed | list[Seed] | None
    plain: bool
    manager: GenerationManager | None
    batching_config: BatchingConfig | None
    prompt_shown: bool = False
    ended: bool = False


@dataclass(slots=True)
class PreparedCall:
    """A call as transformers has prepared it for a callable.

    Attributes:
        media_names: Names of the caller's arguments with pictures, videos or sounds, where they are known.
        submitted: Whether its requests are in the engine: then nothing else may serve it.
        spread: Whether the model is known to be sharded over ranks, so that one rank cannot compute it alone.
    """

    model: PreTrainedModel
    input_ids: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict[str, Any]
    media_names: list[str] = field(default_factory=list)
    submitted: bool = field(default=False, init=False)
    spread: bool = field(default=False, init=False)

    @property
    def bound_to_engine(self) -> bool:
        """Whether plain `generate` cannot serve it in this thread."""
        return self.submitted or self.spread


def with_stop_strings(criteria: StoppingCriteriaList, settings: CallSettings) -> StoppingCriteriaList:
    """Add the criterion for `stop_strings`, which `generate` could not make without the tokenizer."""
    # As in `generate`, a criterion of this type in the caller's list takes precedence.
    if settings.stop_strings is None or any(type(criterion) is StopStringCriteria for criterion in criteria):
        return criteria
    made = stop_string_criterion(settings.stop_strings, settings.tokenizer)
    place = next((i for i, criterion in enumerate(criteria) if type(criterion) is EosTokenCriteria), len(criteria))
    return StoppingCriteriaList([*criteria[:place], made, *criteria[place:]])


@cpu_by_default
def serve(call: PreparedCall, settings: CallSettings) -> GenerateOutput:
    """Run the rows of a call in the engine, and assemble the result as `generate` does; see `drop_in.generate`."""
    refuse_unservable(call.model)
    criteria = with_stop_strings(call.criteria, settings)
    stops = read_criteria(criteria)
    manager, requests, chooser = _requests(call, settings, stops)
    if chooser is None:
        handles = submit_in_portions(manager, requests, manager.config.max_waiting)
        return _serve_rows(call, settings, criteria, stops, handles)
    return _serve_group(call, settings, criteria, stops, manager.submit_group(requests), chooser)


def _serve_rows(
    call: PreparedCall,
    settings: CallSettings,
    criteria: StoppingCriteriaList,
    stops: StopConditions,
    handles: list[GenerationHandle],
) -> GenerateOutput:
    """Read rows that advance independently, with the caller's criteria and streamer in this thread."""
    input_ids, streamer = call.input_ids, settings.streamer
    with _served(call, settings, handles):
        if stops.by_engine and streamer is None:
            completions = [handle.result().token_ids for handle in handles]
            lengths = [len(tokens) for tokens in completions]
        else:
            checker: StopChecker = HostStopChecker(input_ids.tolist(), stops)
            if stops.custom:
                scores = BatchScores(handles, input_ids.device) if handles[0].has_scores else None
                checker = CriteriaListChecker(input_ids, criteria, scores)
            pad = _pad_token(call.config) if stops.pads else None
            completions, lengths = step_batch(handles, checker, pad=pad, streamer=streamer)
    return _output(
        call,
        completions,
        scores=stack_steps(handles, "scores", lengths, input_ids.device),
        logits=stack_steps(handles, "logits", lengths, input_ids.device),
    )


def _serve_group(
    call: PreparedCall,
    settings: CallSettings,
    criteria: StoppingCriteriaList,
    stops: StopConditions,
    handles: list[LogitsHandle],
    chooser: TokenChooser,
) -> GenerateOutput:
    """Step through rows that advance together, with the caller's processors, criteria and streamer in this thread."""
    config = call.config
    returned = bool(config.return_dict_in_generate)
    with _served(call, settings, handles):
        decoded = decode_batch(
            handles,
            chooser,
            criteria,
            pad=_pad_token(config) if stops.pads else None,
            streamer=settings.streamer,
            keep_scores=returned and bool(config.output_scores),
            keep_logits=returned and bool(config.output_logits),
        )
    return _output(
        call,
        decoded.completions,
        scores=tuple(decoded.scores) if config.output_scores else None,
        logits=tuple(decoded.logits) if config.output_logits else None,
    )


@contextlib.contextmanager
def _served(call: PreparedCall, settings: CallSettings, handles: Sequence[GenerationHandle]) -> Iterator[None]:
    """Show the streamer the prompt and the end, and cancel the call's requests however it ends."""
    call.submitted = True
    streamer = settings.streamer
    try:
        if streamer is not None and not settings.prompt_shown:
            streamer.put(call.input_ids.cpu())  # type: ignore[no-untyped-call]
        yield
    finally:
        # Also on Ctrl-C, and if one row failed: then the other rows are not read.
        for handle in handles:
            handle.cancel()
    if streamer is not None:
        settings.ended = True
        streamer.end()  # type: ignore[no-untyped-call]


def _requests(
    call: PreparedCall, settings: CallSettings, stops: StopConditions
) -> tuple[GenerationManager, list[Request], TokenChooser | None]:
    """One request per row of the batch, and the chooser of rows that advance together, or None."""
    input_ids, config = call.input_ids, call.config
    check_fields(config)
    check_ends(stops, config._pad_token_tensor)
    media = media_of(call.model_kwargs)
    mask, embeddings = check_model_inputs(
        call.model_kwargs, input_ids, partial(zeros_are_neutral, call.model), bool(media)
    )
    if mask is not None:
        check_mask(mask, call.model)
    # A criterion of the caller replaces the config's.
    max_length = stops.max_length if stops.max_length < math.inf else config.max_length
    manager = settings.manager
    manager = manager if manager is not None else get_manager(call.model, settings.batching_config)
    if manager.is_here:
        call.spread = manager.spread
        raise ReentrantCallError("it was made in the engine's own thread, by a done-callback")
    if media:
        prompts = manager.media.encode(input_ids, call.model_kwargs, user_name(call.media_names or media))
    else:
        prompts = _prompts(input_ids, mask, embeddings)
    batch = manager.inputs.read_batch(
        prompts,
        config,
        call.processors,
        input_ids,
        seeds=seeds_of_rows(settings.seed, len(prompts)),
        max_new_tokens=max(1, math.ceil(max_length - input_ids.shape[1])),
        eos=stops.eos,
        holds_group=manager.holds_group,
    )
    return manager, batch.requests, batch.chooser


def _prompts(input_ids: torch.Tensor, mask: torch.Tensor | None, embeddings: torch.Tensor | None) -> list[Prompt]:
    """The prompt of each row, without the positions that the mask hides."""
    shown: list[list[int]] = input_ids.tolist()
    if embeddings is not None and not input_ids.shape[1]:
        # Placeholders, which are never looked up.
        input_ids = torch.zeros(embeddings.shape[:2], dtype=torch.long, device="cpu")
    if not input_ids.numel():
        raise ValueError(
            f"`input_ids` of shape {tuple(input_ids.shape)} is empty: a prompt needs at least one token (for example "
            "the BOS token)"
        )
    kept = None if mask is None else mask.tolist()
    prompts: list[Prompt] = []
    for i, tokens in enumerate(input_ids.tolist()):
        given = None if embeddings is None else embeddings[i].detach()
        if mask is not None and kept is not None:
            tokens = [token for token, real in zip(tokens, kept[i], strict=True) if real]
            # Copied only if padding is left out; the caller waits for the result.
            given = None if given is None else given[mask[i].bool()]
        if not tokens:
            raise UnsupportedArgumentError(f"`attention_mask` hides every token of row {i}; leave it out")
        prompts.append(Prompt(tokens, shown[i], given))
    return prompts


def _output(
    call: PreparedCall,
    completions: list[list[int]],
    *,
    scores: tuple[torch.Tensor, ...] | None,
    logits: tuple[torch.Tensor, ...] | None,
) -> GenerateOutput:
    """The output in `generate`'s form."""
    sequences = _assemble(call.input_ids, completions, call.config)
    if not call.config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,  # type: ignore[arg-type]
        scores=scores,  # type: ignore[arg-type]
        logits=logits,  # type: ignore[arg-type]
    )


def _assemble(input_ids: torch.Tensor, completions: list[list[int]], config: GenerationConfig) -> torch.Tensor:
    longest = max(len(tokens) for tokens in completions)
    # Without a pad token there is no end-of-sequence token either, and all rows have the same length.
    fill = _pad_token(config) or 0
    new = torch.tensor([tokens + [fill] * (longest - len(tokens)) for tokens in completions])
    return torch.cat([input_ids, new.to(input_ids.device)], dim=1)


def _pad_token(config: GenerationConfig) -> int | None:
    pad: torch.Tensor | None = config._pad_token_tensor
    return None if pad is None else int(pad)
