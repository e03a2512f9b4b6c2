"""Loads that call `submit`."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from benchmarks.soak.job import EOS, SECONDS, SoakJob
from hf_async_batching.errors import EngineClosedError, QueueFullError, UnsupportedModelError


def greedy(job: SoakJob) -> None:
    """Submit a greedy request."""
    prompt, count = job.prompt(), job.new_tokens()
    with job.maybe_checked() as checked:
        tokens = job.submit(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None).result(SECONDS).token_ids
        if checked:
            job.compare_greedy(prompt, tokens, count)
        else:
            job.done(len(tokens))


def _random_filters(job: SoakJob) -> dict[str, Any]:
    rng = job.rng
    filters: dict[str, Any] = {
        "temperature": rng.choice([0.3, 0.8, 1.0, 1.7]),
        "top_k": rng.choice([0, 1, 3, 50, 190]),
        "top_p": rng.choice([0.2, 0.9, 1.0]),
        "min_p": rng.choice([None, 0.05]),
        "typical_p": rng.choice([1.0, 1.0, 0.6]),
        "epsilon_cutoff": rng.choice([0.0, 0.0, 0.01]),
        "eta_cutoff": rng.choice([0.0, 0.0, 0.01]),
        "top_h": rng.choice([None, None, 0.5]),
        "repetition_penalty": rng.choice([1.0, 1.3]),
    }
    return {name: value for name, value in filters.items() if value is not None}


def drawing(job: SoakJob) -> None:
    """Sample with filters and a seed. Checked requests run twice, in different batches."""
    prompt, count, filters = job.prompt(), job.new_tokens(), _random_filters(job)
    arguments = {"max_new_tokens": count, "do_sample": True, "eos_token_id": None, "seed": job.rng.randrange(1 << 40)}
    with job.maybe_checked() as checked:
        tokens = job.submit(prompt, **arguments, **filters).result(SECONDS).token_ids
        if checked and job.subject.dtype == torch.float32:
            again = job.submit(prompt, **arguments, **filters).result(SECONDS).token_ids
            job.tally.note("drawn twice", len(tokens))
            # Rarely, the rounding of a sum moves the edge of a filter, and another token is drawn.
            if again != tokens:
                job.tally.note("drawn otherwise")
        job.done(len(tokens))


def processed(job: SoakJob) -> None:
    """Combine penalties, n-grams, biases, forced and suppressed tokens, and lengths."""
    rng, vocab = job.rng, job.subject.vocab_size
    prompt, count = job.prompt(), job.new_tokens(32)
    some = [rng.randrange(3, vocab) for _ in range(4)]
    possible: list[dict[str, Any]] = [
        {"repetition_penalty": rng.choice([0.8, 1.2, 2.0])},
        {"no_repeat_ngram_size": rng.randint(1, 4)},
        {"bad_words_ids": [some[:1], some[1:3]]},
        {"sequence_bias": [[some[:1], 5.0], [some[1:3], -5.0]]},
        {"suppress_tokens": some},
        {"begin_suppress_tokens": some[:2]},
        {"forced_bos_token_id": some[0]},
        {"min_new_tokens": rng.randint(1, count), "eos_token_id": [EOS, *some]},
        {"eos_token_id": some},
        {"exponential_decay_length_penalty": (2, 1.3), "eos_token_id": some},
        {"forced_eos_token_id": EOS, "eos_token_id": EOS},
        {"remove_invalid_values": True},
        {"guidance_scale": 1.5},
    ]
    arguments: dict[str, Any] = {}
    for chosen in rng.sample(possible, rng.randint(1, 3)):
        arguments.update(chosen)
    if arguments.get("forced_bos_token_id"):  # `generate` refuses to force what it suppresses
        arguments.pop("begin_suppress_tokens", None)
        arguments.pop("suppress_tokens", None)
    with job.maybe_checked() as checked:
        given = {"eos_token_id": None, **arguments}
        tokens = job.submit(prompt, max_new_tokens=count, do_sample=False, **given).result(SECONDS).token_ids
        if checked:
            job.compare(prompt, tokens, max_new_tokens=count, **arguments)
        else:
            job.done(len(tokens))


def outputs(job: SoakJob) -> None:
    """Request scores, logits and log-probabilities of each token."""
    prompt, count = job.prompt(), job.new_tokens(16)
    with job.maybe_checked() as checked:
        result = job.submit(
            prompt,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            logprobs=True,
            output_scores=True,
            output_logits=True,
            return_dict_in_generate=True,
            repetition_penalty=1.1,
        ).result(SECONDS)
        if not len(result.scores) == len(result.logits) == len(result.logprobs) == len(result.token_ids) == count:
            job.wrong("not each output has one entry per token")
        elif not checked:
            job.done(count)
        else:
            plain = job.plain(prompt, max_new_tokens=count, repetition_penalty=1.1)
            want, got = plain.scores[0][0].float().cpu(), result.scores[0]
            allowed = (0.1 if job.subject.dtype != torch.float32 else 2e-3) * float(want.abs().max())
            difference = float((got - want).abs().max())
            if not difference <= allowed:
                job.wrong(f"the first scores differ by {difference:.2g}; prompt {prompt}")
            else:
                job.compare(prompt, result.token_ids, max_new_tokens=count, repetition_penalty=1.1)


def prompt_lookup(job: SoakJob) -> None:
    """Draft from a prompt that repeats itself."""
    prompt = (job.prompt(12) * 5)[:60]
    count, words = job.new_tokens(), job.rng.randint(1, 6)
    with job.maybe_checked() as checked:
        tokens = (
            job.submit(
                prompt, max_new_tokens=count, do_sample=False, eos_token_id=None, prompt_lookup_num_tokens=words
            )
            .result(SECONDS)
            .token_ids
        )
        if checked:
            job.compare_greedy(prompt, tokens, count)
        else:
            job.done(len(tokens))


def stop_strings(job: SoakJob) -> None:
    """Stop at strings that span several tokens."""
    prompt, count = job.prompt(), job.new_tokens()
    stops = ["".join(job.rng.choices("abcdefgh", k=2)) for _ in range(6)]
    arguments = {"max_new_tokens": count, "stop_strings": stops, "tokenizer": job.tokenizer}
    with job.maybe_checked() as checked:
        tokens = job.submit(prompt, do_sample=False, eos_token_id=None, **arguments).result(SECONDS).token_ids
        if checked:
            job.compare(prompt, tokens, **arguments)
        else:
            job.done(len(tokens))


class EndsAt(StoppingCriteria):
    """A criterion that stops when the sum of all tokens is a multiple of a number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        return input_ids.sum(-1) % self.number == 0


def criteria(job: SoakJob) -> None:
    """Submit with the caller's own stopping criterion."""
    prompt, count = job.prompt(), job.new_tokens()
    arguments: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([EndsAt(job.rng.randint(5, 40))])}
    with job.maybe_checked() as checked:
        handle = job.submit(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None, **arguments)
        tokens = handle.result(SECONDS).token_ids
        if checked:
            job.compare(prompt, tokens, max_new_tokens=count, **arguments)
        else:
            job.done(len(tokens))


def max_time(job: SoakJob) -> None:
    """Submit with a short time limit."""
    handle = job.submit(job.prompt(), max_new_tokens=80, do_sample=False, max_time=job.rng.uniform(0.001, 0.2))
    job.done(len(handle.result(SECONDS).token_ids))


class AddsByHistory(LogitsProcessor):
    """A processor that changes scores by the earlier tokens; it works on any batch."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wave = torch.arange(scores.shape[-1], device=scores.device) + input_ids.sum(-1, keepdim=True)
        return scores + self.strength * (wave % 7).to(scores.dtype)


def processors(job: SoakJob) -> None:
    """Submit with the caller's own logits processor."""
    prompt, count = job.prompt(), job.new_tokens(24)
    arguments = {"logits_processor": [AddsByHistory(job.rng.choice([0.5, 1.0]))]}
    with job.maybe_checked() as checked:
        handle = job.submit(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None, **arguments)
        tokens = handle.result(SECONDS).token_ids
        if checked:
            job.compare(prompt, tokens, max_new_tokens=count, **arguments)
        else:
            job.done(len(tokens))


def prefix_allowed(job: SoakJob) -> None:
    """Submit with a function that returns the allowed next tokens."""
    prompt, count, step = job.prompt(), job.new_tokens(24), job.rng.randint(2, 5)

    def allowed(_: int, sentence: torch.Tensor) -> list[int]:
        return list(range(3 + int(sentence[-1]) % step, job.subject.vocab_size, step))

    with job.maybe_checked() as checked:
        handle = job.submit(
            prompt, max_new_tokens=count, do_sample=False, eos_token_id=None, prefix_allowed_tokens_fn=allowed
        )
        tokens = handle.result(SECONDS).token_ids
        if checked:
            job.compare(prompt, tokens, max_new_tokens=count, prefix_allowed_tokens_fn=allowed)
        else:
            job.done(len(tokens))


def embeddings(job: SoakJob) -> None:
    """Submit embeddings instead of tokens."""
    prompt, count = job.prompt(), job.new_tokens(24)
    with job.maybe_checked() as checked:
        with torch.no_grad():
            given = job.subject.model.get_input_embeddings()(torch.tensor(prompt, device=job.subject.device))
        try:
            handle = job.submit(None, inputs_embeds=given, max_new_tokens=count, do_sample=False, eos_token_id=None)
        except UnsupportedModelError:  # families that are served through their own cache class
            job.tally.add(job.load, "refused")
            return
        tokens = handle.result(SECONDS).token_ids
        if checked:
            job.compare_greedy(prompt, tokens, count)
        else:
            job.done(len(tokens))


def streaming(job: SoakJob) -> None:
    """Read tokens one by one, sometimes slowly."""
    prompt, count = job.prompt(), job.new_tokens()
    pause = job.rng.choice([0.0, 0.0, 0.01])
    with job.maybe_checked() as checked:
        tokens = []
        for token in job.submit(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None):
            tokens.append(token)
            time.sleep(pause)
        if checked:
            job.compare_greedy(prompt, tokens, count)
        else:
            job.done(len(tokens))


def coroutines(job: SoakJob) -> None:
    """Run several coroutines in an event loop; some stop waiting, and some cancel."""
    job.subject.manager.warmup()

    async def read(prompt: list[int], seconds: float | None) -> tuple[int, bool]:
        handle = job.submit(prompt, max_new_tokens=job.new_tokens(), do_sample=True, seed=1, eos_token_id=None)
        count = 0
        try:
            async with asyncio.timeout(seconds):
                async for _ in handle:
                    count += 1
        except TimeoutError:
            handle.cancel()
            return count, False
        return count, True

    async def several() -> list[tuple[int, bool] | BaseException]:
        waits = [job.rng.choice([None, 0.005, 0.05]) for _ in range(job.rng.randint(1, 4))]
        return await asyncio.gather(*[read(job.prompt(), wait) for wait in waits], return_exceptions=True)

    for found in asyncio.run(asyncio.wait_for(several(), SECONDS)):
        if isinstance(found, BaseException):
            job.tally.add(job.load, *outcome_of(found))
        else:
            job.tally.add(job.load, "done" if found[1] else "cancelled", found[0])


def cancelled(job: SoakJob) -> None:
    """Cancel a request sooner or later, sometimes before it has started."""
    arguments = {"max_new_tokens": 60, "do_sample": job.rng.random() < 0.5, "eos_token_id": None}
    handles = [job.submit(job.prompt(), **arguments) for _ in range(job.rng.randint(1, 4))]
    time.sleep(job.rng.choice([0.0, 0.0, 0.01, 0.1]))
    for handle in handles:
        handle.cancel()
    for handle in handles:
        result = handle.result(SECONDS)
        reason = "cancelled" if result.finish_reason == "cancelled" else "done"
        job.tally.add(job.load, reason, len(result.token_ids))


def forgotten(job: SoakJob) -> None:
    """Submit a request, and drop its handle."""
    job.submit(job.prompt(), max_new_tokens=job.new_tokens(16), do_sample=False, eos_token_id=None)
    job.done(0)


def outcome_of(error: BaseException) -> tuple[Any, int, str]:
    """Return outcome, tokens and detail of an error that the load did not cause on purpose."""
    if isinstance(error, EngineClosedError):
        return "closed", 0, ""
    if isinstance(error, QueueFullError):
        return "refused", 0, ""
    return "failed", 0, f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
