"""Loads that call `model.generate(custom_generate=...)` and `generate_dataset`."""

from __future__ import annotations

import importlib.util
import tempfile
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import hf_async_batching
from benchmarks.soak.job import EOS, SoakJob
from benchmarks.soak.loads import AddsByHistory
from hf_async_batching.errors import UnsupportedArgumentError

# Share of the callers' own processors that look at all rows of a batch.
_TOGETHER = 0.5


def _batch(job: SoakJob) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """Make prompts of different lengths, and the same prompts as a left-padded batch."""
    prompts = [job.prompt() for _ in range(job.rng.randint(1, 5))]
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    device = job.subject.device
    return prompts, {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _generate(job: SoakJob, **arguments: Any) -> Any:
    return job.subject.model.generate(
        custom_generate=hf_async_batching.generate, manager=job.subject.manager, **arguments
    )


def padded_batch(job: SoakJob) -> None:
    """Call the drop-in with a padded batch, greedy, sometimes with end-of-sequence tokens."""
    prompts, batch = _batch(job)
    count = job.new_tokens(32)
    eos = job.rng.choice([None, [EOS, 5, 6, 7]])
    with job.maybe_checked() as checked:
        out = _generate(job, **batch, max_new_tokens=count, do_sample=False, eos_token_id=eos)
        for prompt, row in zip(prompts, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            tokens = row if eos is None else _to_end(row, eos)
            if checked:
                job.compare(prompt, tokens, max_new_tokens=count, eos_token_id=eos)
            else:
                job.done(len(tokens))


def _to_end(row: list[int], eos: list[int]) -> list[int]:
    """Return the tokens up to the first end of sequence."""
    at = next((i for i, token in enumerate(row) if token in eos), len(row) - 1)
    return row[: at + 1]


def drawn_batch(job: SoakJob) -> None:
    """Sample several sequences per prompt, with scores and logits."""
    prompts, batch = _batch(job)
    count, each = job.new_tokens(12), job.rng.randint(1, 3)
    out = _generate(
        job,
        **batch,
        max_new_tokens=count,
        do_sample=True,
        eos_token_id=None,
        num_return_sequences=each,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        top_k=20,
        seed=job.rng.randrange(1 << 40),
    )
    shape = (len(prompts) * each, batch["input_ids"].shape[1] + count)
    if tuple(out.sequences.shape) != shape or len(out.scores) != count or len(out.logits) != count:
        job.wrong(f"sequences of shape {tuple(out.sequences.shape)}, not {shape}")
    else:
        job.done(count * shape[0])


class Kept(BaseStreamer):
    """A streamer that keeps its tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt first, then each token."""
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        """Receive the end, after the last token."""
        self.ended = True


def streamer(job: SoakJob) -> None:
    """Call with a streamer, which must see the returned tokens."""
    prompt, kept = job.prompt(), Kept()
    ids = torch.tensor([prompt], device=job.subject.device)
    out = _generate(
        job,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=job.new_tokens(24),
        do_sample=False,
        eos_token_id=None,
        streamer=kept,
    )
    if kept.tokens != out[0].tolist() or not kept.ended:
        job.wrong("the streamer saw other tokens than the returned ones")
    else:
        job.done(out.shape[1] - len(prompt))


class AcrossTheBatch(LogitsProcessor):
    """A processor that looks at all rows at once: it moves each row by their mean, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        shift = (input_ids[:, -1].sum() + self.calls) % 11
        wave = (torch.arange(scores.shape[-1], device=scores.device) * (1 + shift)) % 13
        return scores + wave.to(scores.dtype)


def batch_processors(job: SoakJob) -> None:
    """Call with the caller's own processors on a padded batch, for each row or for all rows together."""
    prompts, batch = _batch(job)
    count, together = job.new_tokens(12), job.rng.random() < _TOGETHER

    def made() -> LogitsProcessorList:
        return LogitsProcessorList([AcrossTheBatch() if together else AddsByHistory(1.0)])

    arguments: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    with job.maybe_checked() as checked:
        try:
            out = _generate(job, **batch, **arguments, logits_processor=made())
        except UnsupportedArgumentError:
            job.tally.add(job.load, "refused")
            return
        rows = out[:, batch["input_ids"].shape[1] :].tolist()
        if not checked or job.subject.dtype != torch.float32:
            job.done(sum(map(len, rows)))
        elif not together:
            for prompt, row in zip(prompts, rows, strict=True):
                job.compare(prompt, row, max_new_tokens=count, logits_processor=made())
        else:
            _compare_batch(job, batch, rows, arguments, made())


def _compare_batch(
    job: SoakJob,
    batch: dict[str, torch.Tensor],
    rows: list[list[int]],
    arguments: dict[str, Any],
    made: LogitsProcessorList,
) -> None:
    with job.subject.plain:
        plain = job.subject.model.generate(
            **batch, **arguments, logits_processor=made, return_dict_in_generate=True, output_scores=True
        )
    job.tally.note("compared")
    want = plain.sequences[:, batch["input_ids"].shape[1] :].tolist()
    at = next((i for i in range(len(want[0])) if any(a[i] != b[i] for a, b in zip(rows, want, strict=True))), None)
    if at is None:
        job.done(sum(map(len, rows)))
    elif all(job.is_tie(plain.scores[at][i], want[i][at], rows[i][at]) for i in range(len(rows))):
        job.tally.note("ties")
        job.done(sum(map(len, rows)))
    else:
        job.wrong(f"token {at} of a batch of {len(rows)} with a processor that looks at all rows")


def dataset(job: SoakJob) -> None:
    """Complete a list of rows with `generate_dataset`, sometimes with a folder."""
    rows = [{"ids": job.prompt(20), "number": i} for i in range(job.rng.randint(1, 24))]
    count = job.new_tokens(8)
    arguments: dict[str, Any] = {"prompt": "ids", "max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    with job.maybe_checked() as checked, tempfile.TemporaryDirectory() as folder:
        given: Any = rows
        if job.rng.random() < 0.3:
            import datasets

            given = datasets.Dataset.from_list(rows)
            arguments["resume_dir"] = f"{folder}/run"
        done = list(hf_async_batching.generate_dataset(job.subject.manager, given, progress=False, **arguments))
        if [row["number"] for row in done] != list(range(len(rows))):
            job.wrong("the rows of a dataset came back in another order")
            return
        for row in done:
            tokens = list(row["completion_ids"])
            if checked and row["number"] % 8 == 0:
                job.compare_greedy(list(row["ids"]), tokens, count)
            else:
                job.done(len(tokens))


def dataset_missing() -> str | None:
    """Say why datasets are left out here; None if they are not."""
    return None if importlib.util.find_spec("datasets") else "the datasets package is not installed"
