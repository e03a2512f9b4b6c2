"""Runs a model over a table, and keeps every finished row in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset

from hf_async_batching.dataset.generate import generate_dataset
from hf_async_batching.dataset.run.progress import DatasetProgress

from ..serving.serving import Serving
from ..serving.settings import Settings, ends_of

# A table may take one row of the engine in this many, so that other visitors need not wait for it.
_PART = 8
_COLUMNS = {"text": "completion", "finish_reason": "finish_reason", "error": "error"}
_LEFT_OUT = ("token_ids", "prompt_tokens", "completion_tokens")


class _StoppedError(Exception):
    """The visitor has stopped the run."""


def complete_table(
    serving: Serving,
    table: Dataset,
    column: str,
    settings: Settings,
    folder: Path,
    wanted: Callable[[DatasetProgress], bool],
) -> Dataset | None:
    """Answer every row of a table as a chat message; blocks.

    Args:
        serving: The engine.
        table: The rows.
        column: Which column holds the prompts.
        settings: System prompt and sampling.
        folder: Keeps the finished rows; a stopped run continues from there.
        wanted: Called about twice a second with the progress; returns whether to go on.

    Returns:
        The table with each row's completion and the reason for its end, or its error; None if the run was stopped.
    """

    def look(progress: DatasetProgress) -> None:
        # A run whose last row is done is over, even if the visitor pressed Stop meanwhile.
        if not wanted(progress) and (progress.total is None or progress.rows < progress.total):
            raise _StoppedError

    names: dict[str, str | None] = {**column_names(table)}
    try:
        completed: Dataset = generate_dataset(
            serving.manager,
            table,
            serving.chat_model.tokenizer,
            prompt=column,
            chat=True,
            system_prompt=settings.system or None,
            resume_dir=folder / "done",
            on_error="record",
            output_columns={**names, **dict.fromkeys(_LEFT_OUT)},
            seed=settings.seed or 0,
            window=rows_of_a_table(serving),
            progress=False,
            callback=look,
            rank=0,
            world_size=1,
            eos_token_id=list(ends_of(serving.chat_model)) or None,
            **settings.generate_arguments(),
        )
    except _StoppedError:
        return None
    return completed


def column_names(table: Dataset) -> dict[str, str]:
    """Return the names of the new columns, by their content."""
    return {kind: _free(name, table) for kind, name in _COLUMNS.items()}


def rows_of_a_table(serving: Serving) -> int:
    """Return how many rows of a table are with the engine at once."""
    assembly = serving.manager.assembly
    return max(1, assembly.config.max_rows // _PART) if assembly is not None else 1


def _free(name: str, table: Dataset) -> str:
    """Return a name that no column has."""
    while name in table.column_names:
        name += "_"
    return name
