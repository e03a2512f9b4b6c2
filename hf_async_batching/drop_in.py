"""`generate`: the callable for `model.generate(..., custom_generate=...)`, and the same called directly.

transformers prepares everything (padding, lengths, special tokens, processors) and calls the function once; rows of
the batch become requests of the model's shared manager, where they meet the rows of every other call.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_async_batching.config import BatchingConfig
from hf_async_batching.errors import UnsupportedArgumentError
from hf_async_batching.generation_fields import check_fields
from hf_async_batching.handle import GenerationHandle
from hf_async_batching.manager import GenerationManager
from hf_async_batching.prepared_checks import check_criteria, check_model_inputs
from hf_async_batching.processor_reader import CallRow, called, read_processors
from hf_async_batching.registry import get_manager
from hf_async_batching.requests_from_config import Seed, build_request, eos_token_ids, seeds_of_rows

GenerateOutput = torch.Tensor | GenerateDecoderOnlyOutput


def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor | None = None,
    *,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: BaseStreamer | None = None,
    seed: Seed | list[Seed] | None = None,
    manager: GenerationManager | None = None,
    batching_config: BatchingConfig | None = None,
    bound_streamer: BaseStreamer | None = None,
    bound_seed: Seed | list[Seed] | None = None,
    **kwargs: Any,
) -> GenerateOutput:
    """Like `model.generate`, served by the asynchronous engine together with all other calls on the model.

    Use it in place, `model.generate(**inputs, custom_generate=hf_async_batching.generate)`, or directly,
    `hf_async_batching.generate(model, **inputs)`; the arguments are those of `model.generate`.

    Args:
        model: A causal language model; not changed.
        input_ids: Prompts [batch, length], padded on any side where `attention_mask` says so.
        logits_processor: As for `generate`; custom ones are called once per row, with a batch of one.
        stopping_criteria: As for `generate`; custom ones are not served yet.
        generation_config: As for `generate`.
        streamer: As for `generate`, for a single prompt; its methods run in the calling thread.
        seed: Makes sampling reproducible whatever else is in the batch: one for the call, or one per sequence; each
            an integer, or a `torch.Generator` from which one number is drawn.
        manager: The manager to use; the model's shared one where None.
        batching_config: Settings for the model's shared manager, where this call is the one that makes it.
        bound_streamer: Set by `GenerationManager.bind`.
        bound_seed: Set by `GenerationManager.bind`.
        kwargs: Everything else that `generate` takes.

    Returns:
        What `generate` returns: int64 [batch * num_return_sequences, length + new], filled on the right with the pad
        token, on the device of the prompts; or, with `return_dict_in_generate=True`, a `GenerateDecoderOnlyOutput`
        whose `sequences` they are (there is no `past_key_values` to return: the cache is shared). Its `scores` and
        `logits`, where asked for, are those of `generate`, but 0 for rows that have ended.

    Raises:
        UnsupportedArgumentError: An argument that is not served; it names the argument and the remedy.
        ValueError: An argument is out of range.
        RequestTooLongError: Prompt and new tokens exceed the context or the cache.
    """
    streamer = streamer if streamer is not None else bound_streamer
    seed = seed if seed is not None else bound_seed
    if logits_processor is None or stopping_criteria is None or not hasattr(generation_config, "_eos_token_tensor"):
        return _through_transformers(
            model,
            {
                "input_ids": input_ids,
                "generation_config": generation_config,
                "logits_processor": logits_processor,
                "stopping_criteria": stopping_criteria,
                "streamer": streamer,
                "seed": seed,
                "manager": manager,
                "batching_config": batching_config,
                **kwargs,
            },
        )
    assert input_ids is not None and generation_config is not None
    caller = _arguments_lost_on_the_way()
    if caller.get("assistant_model") is not None:
        raise UnsupportedArgumentError("`assistant_model` is not served; use plain `model.generate` for this call")
    if caller.get("synced_gpus"):
        raise UnsupportedArgumentError("`synced_gpus` is not served; use plain `model.generate` for this call")
    given = caller.get("streamer")
    if given is not None and streamer is not None and given is not streamer:
        raise ValueError("two different streamers: one is bound, the other was given to `generate`; pass only one")
    # transformers has shown the prompt to a streamer that went through its own argument.
    prompt_shown = given is not None
    streamer = given if given is not None else streamer
    if streamer is not None and input_ids.shape[0] != 1:
        raise ValueError(
            f"`streamer` takes a single sequence, got {input_ids.shape[0]}; call generate once per prompt"
        )
    ended = False
    try:
        if streamer is not None and not prompt_shown:
            streamer.put(input_ids.cpu())
        manager = manager if manager is not None else get_manager(model, batching_config)
        handles = _submit(manager, input_ids, generation_config, logits_processor, stopping_criteria, seed, kwargs)
        try:
            if streamer is not None:
                for token in handles[0]:
                    streamer.put(torch.tensor([token], device="cpu"))  # type: ignore[no-untyped-call]
                streamer.end()  # type: ignore[no-untyped-call]
                ended = True
            results = [handle.result() for handle in handles]
        finally:
            # Also on Ctrl-C, and where one of the rows failed: nobody is left to read the others.
            for handle in handles:
                handle.cancel()
    finally:
        # A reader in another thread waits for the end, whatever went wrong.
        if streamer is not None and not ended:
            streamer.end()  # type: ignore[no-untyped-call]
    sequences = _assemble(input_ids, [result.token_ids for result in results], generation_config)
    if generation_config.return_dict_in_generate:
        scores = _steps([result.scores for result in results], input_ids.device)
        logits = _steps([result.logits for result in results], input_ids.device)
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits)  # type: ignore[arg-type]
    return sequences


def _through_transformers(model: PreTrainedModel, arguments: dict[str, Any]) -> GenerateOutput:
    """Have `model.generate` prepare the call, as it does for any `custom_generate`."""
    if arguments.pop("custom_generate", None) not in (None, generate):
        raise ValueError("`custom_generate` makes no sense here: this function is the custom generate")
    # None means "not given" for named parameters only: as a field (eos_token_id=None) it is a value of its own.
    named = {*inspect.signature(generate).parameters, *inspect.signature(GenerationMixin.generate).parameters}
    given = {name: value for name, value in arguments.items() if value is not None or name not in named}
    if "inputs" in given and "input_ids" in given:
        raise ValueError("pass either `inputs` or `input_ids`, not both")
    out: GenerateOutput = model.generate(custom_generate=generate, **given)  # type: ignore[operator]
    return out


def _arguments_lost_on_the_way() -> dict[str, Any]:
    """Arguments of `GenerationMixin.generate` that it does not hand to a callable, read from its frame.

    Without this a streamer would hang its reader: transformers shows it the prompt and never its end.
    """
    body = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    try:
        # The nearest one is the one that called: wrappers of the user's may stand between.
        while frame is not None and frame.f_code is not body:
            frame = frame.f_back
        names = ("streamer", "assistant_model", "synced_gpus")
        return {name: frame.f_locals.get(name) for name in names} if frame is not None else {}
    finally:
        del frame


def _submit(
    manager: GenerationManager,
    input_ids: torch.Tensor,
    config: GenerationConfig,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    seed: Seed | list[Seed] | None,
    model_kwargs: dict[str, Any],
) -> list[GenerationHandle]:
    """One request per row of the batch."""
    width, count = input_ids.shape[1], input_ids.shape[0]
    check_fields(config)
    check_criteria(criteria, config)
    mask = check_model_inputs(model_kwargs, input_ids)
    shown = input_ids.tolist()
    rows = shown
    if mask is not None:
        rows = [
            [token for token, real in zip(row, keep, strict=True) if real]
            for row, keep in zip(shown, mask.tolist(), strict=True)
        ]
    eos, do_sample = eos_token_ids(config), bool(config.do_sample)
    requests = []
    for i, seed_of_row in enumerate(seeds_of_rows(seed, count)):
        row = CallRow(shown[i], rows[i], i, count, eos, config._eos_token_tensor, input_ids[i])
        recipe = read_processors(processors, row, do_sample=do_sample, seed=seed_of_row)
        if recipe is None:
            recipe = called(processors, row, do_sample=do_sample, seed=seed_of_row, plain_model=manager.plain_view)
        requests.append(build_request(rows[i], config, recipe, max_new_tokens=config.max_length - width))
    return manager.submit_requests(requests)


def _steps(rows: list[list[torch.Tensor] | None], device: torch.device) -> tuple[torch.Tensor, ...] | None:
    """Per step what all rows brought, float32 [batch, vocab]; 0 for rows that had ended."""
    brought = [row for row in rows if row is not None]
    if not brought:
        return None
    longest = max(brought, key=len)
    nothing = torch.zeros_like(longest[0])
    return tuple(
        torch.stack([row[step] if step < len(row) else nothing for row in brought]).to(device)
        for step in range(len(longest))
    )


def _assemble(input_ids: torch.Tensor, completions: list[list[int]], config: GenerationConfig) -> torch.Tensor:
    longest = max(len(tokens) for tokens in completions)
    pad = config._pad_token_tensor
    # Without a pad token there is no end-of-sequence token either, and all rows have the same length.
    fill = int(pad) if pad is not None else 0
    new = torch.tensor([tokens + [fill] * (longest - len(tokens)) for tokens in completions], dtype=input_ids.dtype)
    return torch.cat([input_ids, new.to(input_ids.device)], dim=1)
