"""A model over a table, with a folder in which nothing that is done is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset

from hf_async_batching.dataset.generate import generate_dataset
from hf_async_batching.dataset.run.progress import DatasetProgress

from ..serving.serving import Serving
from ..serving.settings import Settings, ends_of

# The part of the engine's rows that a table may take: other visitors do not wait for it.
_PART = 8
_COLUMNS = {"text": "completion", "finish_reason": "finish_reason", "error": "error"}
_LEFT_OUT = ("token_ids", "prompt_tokens", "completion_tokens")


class _StoppedError(Exception):
    """The visitor has had enough."""


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
        folder: Keeps what is done; a run that was stopped goes on from there.
        wanted: Is told about twice a second how far the run is, and says whether to go on.

    Returns:
        The table with the completion, why it ended, and what went wrong where a row has none; None where the run was
        stopped.
    """

    def look(progress: DatasetProgress) -> None:
        # A run whose last row is done is over, whatever the visitor pressed meanwhile.
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
    """Return the names of the new columns, by what they hold."""
    return {kind: _free(name, table) for kind, name in _COLUMNS.items()}


def rows_of_a_table(serving: Serving) -> int:
    """Return how many rows of a table are with the engine at once."""
    assembly = serving.manager.assembly
    return max(1, assembly.config.max_rows // _PART) if assembly is not None else 1


def _free(name: str, table: Dataset) -> str:
    """A name that no column has."""
    while name in table.column_names:
        name += "_"
    return name
