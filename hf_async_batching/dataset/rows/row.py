"""A row in the stages of a run: as read, as prepared for the engine, and as finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

OnError = Literal["record", "raise"]
"""How a run handles a row that cannot be served."""


class RowBlock(NamedTuple):
    """Consecutive rows as they were read.

    Attributes:
        start: Index of the first row in the dataset.
        rows: The columns from which prompts and row parameters are made, or all columns.
        table: All columns as a `pyarrow.Table`; None for plain Python rows.
    """

    start: int
    rows: Sequence[Mapping[str, Any]]
    table: Any = None


@dataclass(slots=True)
class PreparedRow:
    """A row that is ready for the engine, or that failed before.

    Attributes:
        index: Index of the row in the dataset.
        prompt: Token ids; empty if the row has an `error`.
        parameters: `GenerationConfig` fields of this row only.
        seed: The row's own seed, if a column gives one.
        error: What is wrong with the row.
    """

    index: int
    prompt: Sequence[int] = ()
    parameters: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    error: str | None = None


@dataclass(slots=True)
class Completion:
    """One completion of a prompt.

    Attributes:
        token_ids: New tokens.
        finish_reason: "eos", "length" or "stop".
        logprobs: Log-probabilities of the tokens, if requested.
        text: The tokens decoded; None without a tokenizer.
    """

    token_ids: list[int]
    finish_reason: str
    logprobs: list[float] | None = None
    text: str | None = None


@dataclass(slots=True)
class RowResult:
    """A finished row.

    Attributes:
        index: Index of the row in the dataset.
        prompt_tokens: Length of the prompt; None without a prompt.
        completions: Completions in the order of their indices; empty if the row has an `error`.
        error: What went wrong.
    """

    index: int
    prompt_tokens: int | None = None
    completions: list[Completion] = field(default_factory=list)
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        """Number of new tokens in all completions."""
        return sum(len(completion.token_ids) for completion in self.completions)
