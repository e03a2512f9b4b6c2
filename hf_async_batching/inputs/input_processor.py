"""`InputProcessor` turns the arguments of `submit` or `generate` into requests.

`submit` passes a prompt, a generation config and fields, which transformers prepares here. `generate` passes a batch
that transformers has already prepared. From there on both take the same path: the processor reads the prepared config
and its logits processors once per row. A list of processors that cannot be read as parameters is called as a whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria

from hf_async_batching.core.field_checks import check_real
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.core.suggestions import did_you_mean
from hf_async_batching.errors import UnsupportedArgumentError
from hf_async_batching.host_decoding.token_chooser import TokenChooser
from hf_async_batching.inputs.custom_processors import (
    can_be_row_wise,
    is_row_wise,
    processors_of_batch,
    processors_of_row,
)
from hf_async_batching.inputs.generate_arguments import RequestArguments
from hf_async_batching.inputs.generation_fields import bound_encoder_ngrams, check_fields
from hf_async_batching.inputs.logits_processors import CallRow, SamplingSpec, read_processors
from hf_async_batching.inputs.prompts import Prompt, PromptIds, read_prompt
from hf_async_batching.inputs.request_builder import (
    Seed,
    build_request,
    check_history,
    eos_token_ids,
    new_request_id,
    seeds_of_rows,
)
from hf_async_batching.runtime.default_device import cpu_by_default
from hf_async_batching.stopping.criteria import check_other_ends, stop_string_criterion

# Arguments of `submit` from which transformers makes processors.
_PROCESSOR_ARGUMENTS = (
    "logits_processor",
    "prefix_allowed_tokens_fn",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)


@dataclass(frozen=True, slots=True)
class Submission:
    """The requests and criteria of one `submit` call.

    Attributes:
        request: The request for the engine.
        criteria: Criteria that are called outside the engine; empty if the engine alone ends the request.
        history: Token ids of the prompt as criteria see them; empty for a prompt that is only embeddings.
    """

    request: Request
    criteria: StoppingCriteriaList
    history: list[int]


@dataclass(frozen=True, slots=True)
class BatchRequests:
    """The requests of one `generate` call.

    Attributes:
        requests: One per row.
        chooser: Chooses the tokens of all rows together, which form a group; None if rows are independent.
    """

    requests: list[Request]
    chooser: TokenChooser | None


class InputProcessor:
    """Makes requests for one model.

    Args:
        model: Returns the model, or raises if it is no longer served.
        plain_view: Makes a view of the model that runs its own attention, for a processor's second forward.
    """

    def __init__(self, model: Callable[[], PreTrainedModel], plain_view: Callable[[], PreTrainedModel]) -> None:
        self._model = model
        self._plain_view = plain_view

    @cpu_by_default
    def read_submission(
        self,
        input_ids: PromptIds | Prompt | None,
        generation_config: GenerationConfig | None,
        *,
        seed: Seed | None = None,
        logprobs: bool = False,
        request_id: str | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        tokenizer: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **arguments: Any,
    ) -> Submission:
        """Read one prompt, or take one that was read; see `GenerationManager.submit` for arguments and errors."""
        model: Any = self._model()
        prompt = input_ids if isinstance(input_ids, Prompt) else read_prompt(input_ids, inputs_embeds, tokenizer)
        of_processors = {name: arguments.pop(name, None) for name in _PROCESSOR_ARGUMENTS}
        config, unknown = model._prepare_generation_config(generation_config, **arguments)
        if unknown:
            raise TypeError(
                f"submit() got arguments that GenerationConfig does not have: {sorted(unknown)}; "
                "for a padded batch or model inputs other than token ids call hf_async_batching.generate"
                + did_you_mean(unknown, known_arguments())
            )
        check_fields(config)
        if (config.num_return_sequences or 1) != 1:
            raise UnsupportedArgumentError("submit() makes one sequence; call it `num_return_sequences` times")
        max_new_tokens = config.max_new_tokens
        if max_new_tokens is None:
            lengths = (arguments.get("max_length"), model.generation_config.max_length)
            given = any(length is not None for length in (*lengths, getattr(generation_config, "max_length", None)))
            # The default counts only new tokens, as in `generate`.
            max_new_tokens = config.max_length - len(prompt.tokens) if given else config.max_length
        (number,) = seeds_of_rows(seed, 1)
        criteria = _criteria_beside_engine(config, stopping_criteria, tokenizer)
        spec = self._spec_of_prompt(prompt, config, max_new_tokens, number, logprobs, of_processors)
        return Submission(_request(prompt, config, spec, max_new_tokens, request_id), criteria, prompt.shown)

    def default_request(self) -> Request | None:
        """A request by the model's own generation config, if that needs more than arg-max; used by a warm-up."""
        model: Any = self._model()
        config, _ = model._prepare_generation_config(None)
        if not config.do_sample and config.repetition_penalty in (None, 1.0):
            return None
        prompt = Prompt([0], [0])
        return _request(prompt, config, self._spec_of_prompt(prompt, config, 1, 0, False, {}), 1)

    def read_batch(
        self,
        prompts: list[Prompt],
        config: GenerationConfig,
        processors: LogitsProcessorList,
        input_ids: torch.Tensor,
        *,
        seeds: list[int],
        max_new_tokens: int,
        eos: tuple[int, ...],
        holds_group: Callable[[list[Request]], bool],
    ) -> BatchRequests:
        """Read the rows of a call that `generate` has prepared.

        Args:
            prompts: One per row.
            config: Prepared config that `check_fields` has checked.
            processors: Prepared processors for all rows.
            input_ids: int64 [rows, length], as processors see them.
            seeds: One per row.
            max_new_tokens: Maximum by the call's criteria.
            eos: End-of-sequence tokens by the call's criteria.
            holds_group: Whether the engine can hold requests at the same time; called only if it matters.

        Raises:
            ValueError: A field is out of range.
            UnsupportedArgumentError: Some arguments are not served together.
        """
        chooser: TokenChooser | None = None
        specs = _read_specs(processors, prompts, config, seeds)
        if specs is None:
            own = processors_of_batch(processors, self._plain_view)
            called = _called_spec(own, prompts, config, seeds, input_ids)
            specs, chooser = [called] * len(prompts), called.chooser
        requests: list[Request] = []
        for prompt, spec in zip(prompts, specs, strict=True):
            # `generate` warns of a minimum beyond the maximum, and uses the maximum.
            bounded = replace(spec, min_new_tokens=min(spec.min_new_tokens, max_new_tokens))
            request = _request(prompt, config, bounded, max_new_tokens)
            if set(eos) != set(request.eos_token_ids):
                check_other_ends(request.min_new_tokens)
                request = replace(request, eos_token_ids=eos)
            requests.append(request)
        if chooser is None:
            return BatchRequests(requests, None)
        if is_row_wise(processors) or (can_be_row_wise(processors) and not holds_group(requests)):
            # Each row is decoded separately, in its own thread.
            alone = []
            for i, (request, row) in enumerate(zip(requests, _call_rows(prompts, config), strict=True)):
                own = processors_of_row(processors, row, self._plain_view)
                called = _called_spec(own, prompts[i : i + 1], config, seeds[i : i + 1], input_ids[i : i + 1])
                alone.append(replace(request, chooser=called.chooser))
            return BatchRequests(alone, None)
        group = new_request_id()
        return BatchRequests([replace(request, group=group) for request in requests], chooser)

    def _spec_of_prompt(
        self,
        prompt: Prompt,
        config: GenerationConfig,
        max_new_tokens: float,
        seed: int,
        logprobs: bool,
        of_processors: dict[str, Any],
    ) -> SamplingSpec:
        """Let transformers make the processors of one prompt, and read them; `config` is changed."""
        model: Any = self._model()
        eos, length = eos_token_ids(config), len(prompt.shown)
        bound_encoder_ngrams(config, length)
        config.max_length = length + max_new_tokens
        if config.min_new_tokens:
            config.min_length = None
        of_processors["logits_processor"] = LogitsProcessorList(of_processors.get("logits_processor") or [])

        def prepare(device: torch.device) -> LogitsProcessorList:
            config._eos_token_tensor = torch.tensor(eos, device=device) if eos else None
            processors: LogitsProcessorList = model._get_logits_processor(
                config,
                input_ids_seq_length=length,
                encoder_input_ids=torch.tensor([prompt.shown], device=device),
                device=device,
                model_kwargs={},
                **of_processors,
            )
            return processors

        processors = prepare(torch.device("cpu"))  # they are only read, so they need no device
        specs = _read_specs(processors, [prompt], config, [seed], logprobs)
        if specs is not None:
            return specs[0]
        processors = prepare(model.device)
        history = torch.tensor([prompt.shown], dtype=torch.long, device=model.device)
        own = processors_of_batch(processors, self._plain_view)
        return _called_spec(own, [prompt], config, [seed], history, logprobs)


def known_arguments() -> list[str]:
    """The keyword arguments of `submit`."""
    own = inspect.signature(InputProcessor.read_submission).parameters.values()
    named = [parameter.name for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
    return [*RequestArguments.__annotations__, *named, *_PROCESSOR_ARGUMENTS]


def _call_rows(prompts: list[Prompt], config: GenerationConfig) -> list[CallRow]:
    eos: tuple[int, ...] = eos_token_ids(config)
    # As in `generate`: if the prompt is only embeddings, the history begins with the completion.
    return [
        CallRow(prompt.shown, prompt.tokens if prompt.shown else [], i, len(prompts), eos, config._eos_token_tensor)
        for i, prompt in enumerate(prompts)
    ]


def _read_specs(
    processors: LogitsProcessorList,
    prompts: list[Prompt],
    config: GenerationConfig,
    seeds: Sequence[int],
    logprobs: bool = False,
) -> list[SamplingSpec] | None:
    """Read how each row's tokens are chosen, as parameters; None if the list of processors must be called."""
    specs: list[SamplingSpec] = []
    for row, seed in zip(_call_rows(prompts, config), seeds, strict=True):
        spec = read_processors(processors, row, do_sample=bool(config.do_sample), seed=seed, logprobs=logprobs)
        if spec is None:
            return None
        specs.append(spec)
    return specs


def _called_spec(
    processors: LogitsProcessorList,
    prompts: list[Prompt],
    config: GenerationConfig,
    seeds: list[int],
    input_ids: torch.Tensor,
    logprobs: bool = False,
) -> SamplingSpec:
    """How tokens are chosen for rows whose processors are called, outside the engine."""
    do_sample = bool(config.do_sample)
    chooser = TokenChooser(
        processors,
        input_ids,
        do_sample=do_sample,
        seeds=seeds,
        lengths=[len(prompt.tokens) for prompt in prompts],
        logprobs=logprobs,
        logits=bool(config.return_dict_in_generate and config.output_logits),
    )
    return SamplingSpec(
        SamplingParams(do_sample=do_sample, seed=seeds[0] if do_sample else 0, logprobs=logprobs), chooser=chooser
    )


def _request(
    prompt: Prompt,
    config: GenerationConfig,
    spec: SamplingSpec,
    max_new_tokens: float,
    request_id: str | None = None,
) -> Request:
    request = build_request(prompt.tokens, config, spec, max_new_tokens=max_new_tokens, request_id=request_id)
    if prompt.embeddings is not None:
        request = replace(
            request, prompt_embeddings=prompt.embeddings, position_shifts=prompt.shifts, prefix_keys=prompt.keys
        )
        if not prompt.shown:
            check_history(request)
    return request


def _criteria_beside_engine(
    config: GenerationConfig, own: StoppingCriteriaList | None, tokenizer: Any
) -> StoppingCriteriaList:
    """The criteria of a request, in `generate`'s order, without those that the engine decides itself."""
    own = StoppingCriteriaList(own or ())
    kinds = {type(criterion) for criterion in own}  # a criterion of the caller replaces the default one of its class
    made = StoppingCriteriaList()
    if config.max_time is not None and MaxTimeCriteria not in kinds:
        check_real("max_time", config.max_time)
        made.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings is not None and StopStringCriteria not in kinds:
        made.append(stop_string_criterion(config.stop_strings, tokenizer))
    return StoppingCriteriaList([*made, *own])
