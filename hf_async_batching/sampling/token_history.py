"""The rows' rules and token histories, and which tokens occur in them.

Both tables are allocated when the first request needs them, and never replaced, because captured steps hold their
addresses. A row's history is complete before each step's tokens are chosen, because it is written with the step's
inputs.
"""

from __future__ import annotations

import torch

from hf_async_batching.core import row_layout
from hf_async_batching.core.row_layout import HISTORY_START, MAX_PADDING, RULE_WORDS

# Bits of a `seen` entry.
OCCURRED = 1
IN_PROMPT = 2


class TokenHistory:
    """The tables. All methods enqueue device work and must run inside a pipeline kernel.

    Args:
        max_rows: Rows that requests can own; the tables have one more.
        max_length: Tokens that a row can reach, prompt and completion.
        vocab_size: Upper bound of token ids, exclusive.
        device: Device of the tables.

    Attributes:
        words: int32 [rows, HISTORY_START + MAX_PADDING + max_length], in the layout of `row_layout`; None until
            needed.
        seen: uint8 [rows, vocab_size], two bits per token: `OCCURRED` (in the history, without padding) and
            `IN_PROMPT` (in the prompt or its padding); None until needed.
    """

    def __init__(self, *, max_rows: int, max_length: int, vocab_size: int, device: torch.device) -> None:
        self._rows = max_rows + 1
        self._width = HISTORY_START + MAX_PADDING + max_length
        self._vocab = vocab_size
        self._device = device
        self.words: torch.Tensor | None = None
        self.seen: torch.Tensor | None = None

    def ensure(self, *, words: bool, seen: bool) -> None:
        """Allocate the tables that a step needs."""
        if words and self.words is None:
            self.words = torch.zeros(self._rows, self._width, dtype=torch.int32, device=self._device)
        if seen and self.seen is None:
            self.seen = torch.zeros(self._rows, self._vocab, dtype=torch.uint8, device=self._device)

    def start(self, rows: torch.Tensor) -> None:
        """Clear the rules and marks of rows int32 [new]."""
        if self.words is not None:
            self.words[rows, :HISTORY_START] = torch.zeros_like(rows)[:, None]
        if self.seen is not None:
            self.seen[rows] = torch.zeros_like(rows, dtype=torch.uint8)[:, None]

    def write(self, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, params: torch.Tensor) -> None:
        """Write words of new rows.

        Args:
            rows: int32 [words].
            columns: int32 [words].
            values: int32 [words].
            params: int32 [rows, PARAMS], the table of records.
        """
        if self.words is not None:
            self.words[rows.long(), columns.long()] = values
        if self.seen is not None:
            positions = columns - HISTORY_START - params[rows, row_layout.PADDING]
            padding = (columns >= HISTORY_START) & (positions < 0)
            # Before the tokens, because one of them may be the padding token.
            owner = rows * padding
            self.seen[owner.long(), (values * padding).long()] = torch.full_like(owner, IN_PROMPT, dtype=torch.uint8)
            known = positions >= 0
            self._mark(rows * known, positions, values * known, params)

    def note(
        self, rows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor, params: torch.Tensor, *, words: bool
    ) -> None:
        """Record the inputs of a step.

        Args:
            rows: int32 [tokens].
            positions: int32 [tokens].
            tokens: int64 [tokens].
            params: int32 [rows, PARAMS], the table of records.
            words: Whether any row of the step keeps its history.
        """
        if words and self.words is not None:
            columns = HISTORY_START + params[rows, row_layout.PADDING] + positions
            self.words[rows.long(), columns.long()] = tokens.int()
        if self.seen is not None:
            self._mark(rows, positions, tokens, params)

    def _mark(self, rows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor, params: torch.Tensor) -> None:
        assert self.seen is not None
        entries = rows.long(), tokens.long()
        self.seen[entries] = self.seen[entries] | OCCURRED
        # Written last, and all bits at once: tokens of a completion that are computed again after a preemption would
        # race.
        prompt = positions < params[rows, row_layout.PROMPT_LENGTH]
        owner = (rows * prompt).long()
        self.seen[owner, (tokens * prompt).long()] = torch.full_like(owner, OCCURRED | IN_PROMPT, dtype=torch.uint8)

    def rules_of(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """int32 [rows, count, RULE_WORDS], the first rules of the rows."""
        assert self.words is not None
        return self.words[rows, : count * RULE_WORDS].view(rows.shape[0], count, RULE_WORDS)

    def histories_of(self, rows: torch.Tensor, length: int) -> torch.Tensor:
        """int32 [rows, length], the rows' tokens from the first one on, padding included."""
        assert self.words is not None
        return self.words[rows, HISTORY_START : HISTORY_START + length]
