"""Builds the parts of a run from its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hf_async_batching.dataset.rows.prompts import PromptMaker
from hf_async_batching.dataset.rows.row import RowBlock
from hf_async_batching.dataset.run.batch_run import BatchRun, make_decode
from hf_async_batching.dataset.run.progress import Progress
from hf_async_batching.dataset.run.row_requests import RowRequests
from hf_async_batching.dataset.settings import DatasetSettings

# Finished rows may be this many windows ahead of the oldest unfinished row.
_SPAN_WINDOWS = 8


def make_requests(settings: DatasetSettings, split: str) -> RowRequests:
    """Make the requests of a split's rows."""
    return RowRequests(
        settings.manager,
        settings.generation_config,
        settings.arguments,
        tokenizer=settings.tokenizer,
        num_completions=settings.num_completions,
        seed=settings.seed,
        scope=split,
        logprobs=settings.logprobs,
    )


def make_run(
    settings: DatasetSettings, chunks: Iterator[RowBlock], split: str, wanted: Callable[[RowBlock], Any]
) -> BatchRun:
    """Serve the rows of `chunks` that `wanted` picks."""
    prompts = PromptMaker(
        settings.tokenizer,
        settings.prompt,
        settings.row_parameters,
        chat=settings.chat,
        system_prompt=settings.system_prompt,
        tools=settings.tools,
        chat_template_arguments=settings.chat_template_arguments,
    )
    decode = None
    if settings.tokenizer is not None and "text" in settings.columns.names:
        decode = make_decode(settings.tokenizer, settings.skip_special_tokens)
    return BatchRun(
        settings.manager,
        chunks,
        prompts,
        make_requests(settings, split),
        decode,
        wanted=wanted,
        window=settings.window,
        span=_SPAN_WINDOWS * settings.window,
        threads=settings.tokenize_threads,
    )


def make_progress(settings: DatasetSettings, total: int | None, split: str) -> Progress:
    """Make the display of a run over `total` rows."""
    return Progress(settings.manager, total, split=split, bar=settings.progress, callback=settings.callback)


def where(split: str) -> str:
    """Return the split's name as a part of a message; empty without a split."""
    return f" of split {split!r}" if split else ""


def without_unused(settings: DatasetSettings, columns: dict[str, Any]) -> dict[str, Any]:
    """Drop the error column if errors are raised instead."""
    if settings.on_error == "raise":
        columns.pop(settings.columns.names.get("error", ""), None)
    return columns
