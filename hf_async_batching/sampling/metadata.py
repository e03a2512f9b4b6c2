"""Parameters of the rows whose tokens the sampler chooses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_async_batching.core import row_layout
from hf_async_batching.core.plan import NO_BOUNDS, Bounds
from hf_async_batching.sampling.token_history import TokenHistory


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """The rows of a step's sampled positions.

    Attributes:
        params: int32 [sampled, PARAMS], records in the layout of `row_layout`.
        positions: int64 [sampled], the position of each sampled token, which is the number of tokens before it.
        rows: int32 [sampled], the rows; None if no history is read.
        memory: The histories of all rows; None if no history is read.
        bounds: Sizes that no row exceeds.
    """

    params: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor | None = None
    memory: TokenHistory | None = None
    bounds: Bounds = NO_BOUNDS

    def integers(self, column: int) -> torch.Tensor:
        """A column of the records, int32 [sampled, 1]."""
        return self.params[:, column, None]

    def floats(self, column: int) -> torch.Tensor:
        """A column of the records, float32 [sampled, 1]."""
        return self.params[:, column].contiguous().view(torch.float32)[:, None]

    def doubles(self, column: int) -> torch.Tensor:
        """Two columns of the records, float64 [sampled, 1]."""
        return self.params[:, column : column + 2].clone(memory_format=torch.contiguous_format).view(torch.float64)

    def seen(self, vocab: int) -> torch.Tensor:
        """uint8 [sampled, vocab]; see `TokenHistory.seen`."""
        assert self.memory is not None and self.memory.seen is not None and self.rows is not None
        return self.memory.seen[self.rows, :vocab]

    @property
    def lengths(self) -> torch.Tensor:
        """int64 [sampled, 1], lengths of the histories in tokens, padding included."""
        return self.positions[:, None] + self.params[:, row_layout.PADDING, None]
