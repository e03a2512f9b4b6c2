"""A call that transformers has prepared for a callable, and how the engine serves it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_async_batching.config import BatchingConfig
from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.drop_in.input_checks import check_mask, check_model_inputs
from hf_async_batching.drop_in.neutral_inputs import zeros_are_neutral
from hf_async_batching.drop_in.portions import submit_in_portions
from hf_async_batching.errors import ReentrantCallError, UnsupportedArgumentError, UnsupportedModelError
from hf_async_batching.host_decoding.batch_decoding import decode_batch
from hf_async_batching.host_decoding.logits_handle import LogitsHandle
from hf_async_batching.host_decoding.token_chooser import TokenChooser
from hf_async_batching.inputs.generation_fields import check_fields
from hf_async_batching.inputs.logits_processors import (
    CallRow,
    Recipe,
    can_be_row_wise,
    is_row_wise,
    processors_of_batch,
    processors_of_row,
    read_processors,
)
from hf_async_batching.inputs.request_builder import Seed, build_request, eos_token_ids, new_request_id, seeds_of_rows
from hf_async_batching.manager import GenerationManager
from hf_async_batching.registry import get_manager
from hf_async_batching.runner.prompt_embeddings import check_history
from hf_async_batching.runtime.default_device import cpu_by_default
from hf_async_batching.stopping.batch_scores import StepScores, stack_steps
from hf_async_batching.stopping.batch_stepper import run_in_lockstep
from hf_async_batching.stopping.criteria import (
    HostJudge,
    Judge,
    ListJudge,
    Stops,
    check_ends,
    check_other_ends,
    read_criteria,
    stop_string_criterion,
)

GenerateOutput = torch.Tensor | GenerateDecoderOnlyOutput


@dataclass(slots=True)
class CallSettings:
    """Arguments that are not transformers' to prepare."""

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
        submitted: Whether its requests are in the engine: from then on nothing else may serve it.
        spread: Whether the model is known to be spread over ranks, so that one of them cannot compute it alone.
    """

    model: PreTrainedModel
    input_ids: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict[str, Any]
    submitted: bool = field(default=False, init=False)
    spread: bool = field(default=False, init=False)

    @property
    def bound_to_engine(self) -> bool:
        """Whether plain `generate` cannot serve it in this thread."""
        return self.submitted or self.spread


def refuse_encoder(model: PreTrainedModel) -> None:
    """Refuse models with an encoder and a decoder.

    Raises:
        UnsupportedModelError: It is one.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not served: it has an encoder and a decoder. Use plain `model.generate`."
        )


def with_stop_strings(criteria: StoppingCriteriaList, settings: CallSettings) -> StoppingCriteriaList:
    """The list that `generate` would have made, had it not lost the tokenizer."""
    # As there, a criterion of the same type that the caller has made takes precedence.
    if settings.stop_strings is None or any(type(criterion) is StopStringCriteria for criterion in criteria):
        return criteria
    made = stop_string_criterion(settings.stop_strings, settings.tokenizer)
    place = next((i for i, criterion in enumerate(criteria) if type(criterion) is EosTokenCriteria), len(criteria))
    return StoppingCriteriaList([*criteria[:place], made, *criteria[place:]])


@cpu_by_default
def serve(call: PreparedCall, settings: CallSettings) -> GenerateOutput:
    """Run the rows of a call in the engine and put them together as `generate` does; see `drop_in.generate`."""
    refuse_encoder(call.model)
    input_ids, config, streamer = call.input_ids, call.config, settings.streamer
    criteria = with_stop_strings(call.criteria, settings)
    stops = read_criteria(criteria)
    manager, requests, chooser = _requests(call, settings, stops)
    if chooser is not None:
        return _serve_group(call, settings, criteria, manager.submit_group(requests), chooser)
    handles = submit_in_portions(manager, requests, manager.config.max_waiting)
    call.submitted = True
    try:
        if streamer is not None and not settings.prompt_shown:
            streamer.put(input_ids.cpu())  # type: ignore[no-untyped-call]
        if stops.by_engine and streamer is None:
            completions = [handle.result().token_ids for handle in handles]
            lengths = [len(tokens) for tokens in completions]
        else:
            judge: Judge = HostJudge(input_ids.tolist(), stops)
            if stops.custom:
                scores = StepScores(handles, input_ids.device) if handles[0].has_scores else None
                judge = ListJudge(input_ids, criteria, scores)
            pad = _pad_token(config) if stops.pads else None
            completions, lengths = run_in_lockstep(handles, judge, pad=pad, streamer=streamer)
    finally:
        # Also on Ctrl-C, and where one of the rows failed: nobody is left to read the others.
        for handle in handles:
            handle.cancel()
    if streamer is not None:
        settings.ended = True
        streamer.end()  # type: ignore[no-untyped-call]
    sequences = _assemble(input_ids, completions, config)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,  # type: ignore[arg-type]
        scores=stack_steps(handles, "scores", lengths, input_ids.device),  # type: ignore[arg-type]
        logits=stack_steps(handles, "logits", lengths, input_ids.device),  # type: ignore[arg-type]
    )


def _serve_group(
    call: PreparedCall,
    settings: CallSettings,
    criteria: StoppingCriteriaList,
    handles: list[LogitsHandle],
    chooser: TokenChooser,
) -> GenerateOutput:
    """Step through a batch in lockstep, with the caller's processors, criteria and streamer in this thread."""
    call.submitted = True
    config, streamer = call.config, settings.streamer
    returned = bool(config.return_dict_in_generate)
    try:
        if streamer is not None and not settings.prompt_shown:
            streamer.put(call.input_ids.cpu())  # type: ignore[no-untyped-call]
        decoded = decode_batch(
            handles,
            chooser,
            criteria,
            pad=_pad_token(config) if read_criteria(criteria).pads else None,
            streamer=streamer,
            keep_scores=returned and bool(config.output_scores),
            keep_logits=returned and bool(config.output_logits),
        )
    finally:
        for handle in handles:
            handle.cancel()
    if streamer is not None:
        settings.ended = True
        streamer.end()  # type: ignore[no-untyped-call]
    sequences = _assemble(call.input_ids, decoded.completions, config)
    if not returned:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,  # type: ignore[arg-type]
        scores=tuple(decoded.scores) if config.output_scores else None,  # type: ignore[arg-type]
        logits=tuple(decoded.logits) if config.output_logits else None,  # type: ignore[arg-type]
    )


def _requests(
    call: PreparedCall, settings: CallSettings, stops: Stops
) -> tuple[GenerationManager, list[Request], TokenChooser | None]:
    """One request per row of the batch, and what chooses their tokens where all of them advance together."""
    input_ids, config = call.input_ids, call.config
    check_fields(config)
    check_ends(stops, config._pad_token_tensor)
    mask, embeddings = check_model_inputs(call.model_kwargs, input_ids, partial(zeros_are_neutral, call.model))
    if mask is not None:
        check_mask(mask, call.model)
    # A caller's own criterion of this kind takes the place of the config's.
    max_length = stops.max_length if stops.max_length < math.inf else config.max_length
    max_new_tokens = max(1, math.ceil(max_length - input_ids.shape[1]))
    shown = input_ids.tolist()
    prompts = _prompts(_placeholders(input_ids, embeddings), mask)
    manager = settings.manager
    manager = manager if manager is not None else get_manager(call.model, settings.batching_config)
    if manager.is_here:
        call.spread = manager.spread
        raise ReentrantCallError("it was made in the engine's own thread, by a done-callback")
    eos, do_sample, count = eos_token_ids(config), bool(config.do_sample), len(prompts)
    seeds = seeds_of_rows(settings.seed, count)
    rows = [
        # As in `generate`: the history of a prompt of embeddings alone begins with its completion.
        CallRow(shown[i], prompts[i] if shown[i] else [], i, count, eos, config._eos_token_tensor)
        for i in range(count)
    ]
    recipes: list[Recipe] = []
    for row, seed in zip(rows, seeds, strict=True):
        recipe = read_processors(call.processors, row, do_sample=do_sample, seed=seed)
        if recipe is None:
            break
        recipes.append(recipe)
    batch: TokenChooser | None = None
    if len(recipes) < count:
        batch = _chooser(call, prompts, seeds, processors_of_batch(call.processors, manager.plain_view))
        recipes = [(SamplingParams(), LogitsParams(), 0, (), batch)] * count
    requests: list[Request] = []
    for i, (sampling, logits, least, padding, chooser) in enumerate(recipes):
        # `generate` warns of a minimum beyond the maximum, and goes up to the latter.
        recipe = (sampling, logits, min(least, max_new_tokens), padding, chooser)
        request = build_request(prompts[i], config, recipe, max_new_tokens=max_new_tokens)
        if set(stops.eos) != set(eos):
            check_other_ends(request.min_new_tokens)
            request = replace(request, eos_token_ids=stops.eos)
        if embeddings is not None:
            given = embeddings[i].detach()
            # Its own memory where padding is left out; else the caller's, who waits for the outcome.
            request = replace(request, prompt_embeddings=given if mask is None else given[mask[i].bool()])
            if not shown[i]:
                check_history(request)
        requests.append(request)
    if batch is None:
        return manager, requests, None
    alone = is_row_wise(call.processors)
    if alone or (can_be_row_wise(call.processors) and not manager.holds_group(requests)):
        # Each row goes its own way, in a thread of its own.
        return manager, [_alone(call, *one, manager) for one in zip(requests, rows, seeds, strict=True)], None
    group = new_request_id()
    return manager, [replace(request, group=group) for request in requests], batch


def _alone(call: PreparedCall, request: Request, row: CallRow, seed: int, manager: GenerationManager) -> Request:
    """A row whose tokens do not depend on the others of its batch."""
    own = processors_of_row(call.processors, row, manager.plain_view)
    i = row.index
    chooser = _chooser(call, [list(request.prompt)], [seed], own, call.input_ids[i : i + 1])
    return replace(request, chooser=chooser)


def _chooser(
    call: PreparedCall,
    prompts: list[list[int]],
    seeds: list[int],
    processors: LogitsProcessorList,
    shown: torch.Tensor | None = None,
) -> TokenChooser:
    config = call.config
    return TokenChooser(
        processors,
        call.input_ids if shown is None else shown,
        do_sample=bool(config.do_sample),
        seeds=seeds,
        lengths=[len(prompt) for prompt in prompts],
        logits=bool(config.return_dict_in_generate and config.output_logits),
    )


def _placeholders(input_ids: torch.Tensor, embeddings: torch.Tensor | None) -> torch.Tensor:
    """The tokens of prompts, or something in their place where only their embeddings were given."""
    if embeddings is None or input_ids.shape[1]:
        return input_ids
    return torch.zeros(embeddings.shape[:2], dtype=torch.long, device="cpu")


def _prompts(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    """The tokens of each row, without those that the mask hides."""
    if not input_ids.numel():
        raise ValueError(
            f"`input_ids` of shape {tuple(input_ids.shape)} is empty: a prompt needs at least one token (for example "
            "the BOS token)"
        )
    rows: list[list[int]] = input_ids.tolist()
    if mask is None:
        return rows
    kept = [
        [token for token, real in zip(row, keep, strict=True) if real]
        for row, keep in zip(rows, mask.tolist(), strict=True)
    ]
    if not all(kept):
        raise UnsupportedArgumentError(f"`attention_mask` hides every token of row {kept.index([])}; leave it out")
    return kept


def _assemble(input_ids: torch.Tensor, completions: list[list[int]], config: GenerationConfig) -> torch.Tensor:
    longest = max(len(tokens) for tokens in completions)
    # Without a pad token there is no end-of-sequence token either, and all rows have the same length.
    fill = _pad_token(config) or 0
    new = torch.tensor([tokens + [fill] * (longest - len(tokens)) for tokens in completions])
    return torch.cat([input_ids, new.to(input_ids.device)], dim=1)


def _pad_token(config: GenerationConfig) -> int | None:
    pad: torch.Tensor | None = config._pad_token_tensor
    return None if pad is None else int(pad)
