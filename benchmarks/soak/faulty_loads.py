"""Loads with mistakes of callers: each error must reach its own caller, and no other request may notice."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor

from benchmarks.soak.job import SECONDS, SoakJob
from hf_async_batching.errors import EngineClosedError, EngineFailedError, HfAsyncBatchingError, QueueFullError

HUGE = 2**40
BAD_ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 0},
    {"max_new_tokens": -3},
    {"max_new_tokens": HUGE},
    {"max_new_tokens": 4, "min_new_tokens": 9},
    {"do_sample": True, "temperature": 0.0},
    {"do_sample": True, "temperature": -1.0},
    {"do_sample": True, "temperature": math.nan},
    {"do_sample": True, "temperature": 1e39},
    {"do_sample": True, "temperature": 1e-39},
    {"do_sample": True, "temperature": "hot"},
    {"do_sample": True, "top_p": 1.5},
    {"do_sample": True, "top_p": math.nan},
    {"do_sample": True, "top_k": -1},
    {"do_sample": True, "top_k": HUGE},
    {"do_sample": True, "min_p": 2.0},
    {"do_sample": True, "typical_p": 3.0},
    {"do_sample": True, "epsilon_cutoff": -1.0},
    {"do_sample": True, "eta_cutoff": math.nan},
    {"do_sample": True, "seed": -1},
    {"do_sample": True, "seed": 2**70},
    {"do_sample": True, "seed": "seven"},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": math.nan},
    {"repetition_penalty": -2.0},
    {"no_repeat_ngram_size": 2**31},
    {"no_repeat_ngram_size": HUGE},
    {"no_repeat_ngram_size": "two"},
    {"no_repeat_ngram_size": 10_000},
    {"bad_words_ids": [[10**9]]},
    {"bad_words_ids": [[-5]]},
    {"bad_words_ids": "words"},
    {"suppress_tokens": [HUGE]},
    {"suppress_tokens": [-1]},
    {"begin_suppress_tokens": [10**9]},
    {"sequence_bias": [[[5], 1e39]]},
    {"sequence_bias": [[[10**9], 1.0]]},
    {"exponential_decay_length_penalty": (HUGE, 1.1)},
    {"exponential_decay_length_penalty": (2, math.nan), "eos_token_id": 5},
    {"forced_eos_token_id": 10**9},
    {"forced_bos_token_id": -7},
    {"eos_token_id": HUGE},
    {"eos_token_id": -4},
    {"prompt_lookup_num_tokens": -1},
    {"prompt_lookup_num_tokens": HUGE},
    {"num_beams": 4},
    {"num_return_sequences": 3},
    {"stop_strings": ["a"]},
    {"max_time": -1.0},
    {"no_such_field": 1},
    {"cache_implementation": "quantized"},
    {"guidance_scale": math.nan},
    {"watermarking_config": {"greenlist_ratio": 5.0}},
)
"""Arguments of `submit`. Most of them must be refused; those that are served must end."""

BAD_PROMPTS: tuple[Any, ...] = ([], [[1, 2]], [-1], [10**9], [2**40], [1.5], "text", None, [None], [5] * 5_000)


def refused(job: SoakJob) -> None:
    """Submit meaningless arguments and prompts."""
    if job.rng.random() < 0.2:
        prompt, arguments = job.rng.choice(BAD_PROMPTS), {"max_new_tokens": 3}
    else:
        prompt, arguments = job.prompt(), {"max_new_tokens": 3, **job.rng.choice(BAD_ARGUMENTS)}
    shown = (
        f"{arguments}" if prompt and isinstance(prompt, list) and len(prompt) < 100 else f"prompt {str(prompt)[:40]}"
    )
    try:
        result = job.submit(prompt, **arguments).result(SECONDS)
    except (EngineClosedError, QueueFullError):
        raise
    except EngineFailedError as error:
        job.tally.add(job.load, "failed", 0, f"{job.subject.name}: {shown} ends the engine: {error}")
    except (HfAsyncBatchingError, ValueError, TypeError, OverflowError):
        job.tally.add(job.load, "refused")
    except TimeoutError:
        job.tally.add(job.load, "failed", 0, f"{job.subject.name}: {shown} never ends")
    except Exception as error:
        if _plain_raises(job, prompt, arguments, type(error)):
            job.tally.add(job.load, "refused")
            return
        detail = f"{job.subject.name}: {shown} raises {type(error).__name__}: {str(error)[:200]}"
        job.tally.add(job.load, "failed", 0, detail)
    else:
        job.done(len(result.token_ids))


def _plain_raises(job: SoakJob, prompt: Any, arguments: dict[str, Any], kind: type[Exception]) -> bool:
    """Whether plain `generate` raises the same kind of error for the same arguments."""
    try:
        job.plain(prompt, **{"eos_token_id": None, **arguments})
    except kind:
        return True
    except Exception:
        return False
    return False


class Faulty(LogitsProcessor):
    """A processor that fails at a later token, in one of many ways."""

    def __init__(self, way: str, at: int) -> None:
        self.way = way
        self.at = at
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        self.calls += 1
        if self.calls < self.at:
            return scores
        if self.way == "raises":
            raise RuntimeError("a processor of the soak raises")
        if self.way == "panics":
            raise Panic("a processor of the soak panics")
        if self.way == "exits":
            raise SystemExit(3)
        if self.way == "wrong shape":
            return scores[:, :5]
        if self.way == "nothing":
            return None
        if self.way == "slow":
            time.sleep(0.05)
        if self.way == "changes its input":
            input_ids.zero_()
            scores.zero_()
        return scores


class Panic(BaseException):
    """An error like pyo3's PanicException, which is not an `Exception`."""


WAYS = ("raises", "panics", "exits", "wrong shape", "nothing", "slow", "changes its input")


def faulty_processor(job: SoakJob) -> None:
    """Submit with a processor that fails."""
    way = job.rng.choice(WAYS)
    handle = job.submit(
        job.prompt(), max_new_tokens=6, do_sample=False, logits_processor=[Faulty(way, job.rng.randint(1, 4))]
    )
    try:
        tokens = handle.result(SECONDS).token_ids
    except (EngineClosedError, QueueFullError):
        raise
    except (EngineFailedError, TimeoutError) as error:
        detail = f"{job.subject.name}: a processor that {way}: {type(error).__name__}: {str(error)[:200]}"
        job.tally.add(job.load, "failed", 0, detail)
    except BaseException:
        job.tally.add(job.load, "refused", len(handle.token_ids))
    else:
        job.done(len(tokens))


def faulty_callback(job: SoakJob) -> None:
    """Add a callback that raises when its request has ended."""

    def raises(_: Any) -> None:
        raise RuntimeError("a callback of the soak raises")

    handle = job.submit(job.prompt(), max_new_tokens=job.new_tokens(8), do_sample=False)
    try:
        handle.add_done_callback(raises)
    except RuntimeError:
        job.tally.note("callbacks that raised in the caller's thread")  # the request had ended before
    job.done(len(handle.result(SECONDS).token_ids))
