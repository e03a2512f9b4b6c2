"""One row on its way through a run: as it was read, as it goes to the engine, as it comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

OnError = Literal["record", "raise"]
"""What becomes of a row that cannot be served."""


class RowBlock(NamedTuple):
    """Consecutive rows as they were read.

    Attributes:
        start: Index of the first row in the dataset.
        rows: What the prompt and the row's parameters are made from: the columns that are needed, or all.
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
        prompt: Token ids; empty where `error` says why.
        parameters: `GenerationConfig` fields of this row alone.
        seed: The row's own seed, where a column gives one.
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
        logprobs: Log-probabilities of the tokens, where asked for.
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
        prompt_tokens: Length of the prompt; None where there was none.
        completions: In the order of their indices; empty where `error` says why.
        error: What went wrong.
    """

    index: int
    prompt_tokens: int | None = None
    completions: list[Completion] = field(default_factory=list)
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        """New tokens of all completions."""
        return sum(len(completion.token_ids) for completion in self.completions)
