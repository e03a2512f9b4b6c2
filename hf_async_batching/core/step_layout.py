"""The layout of a step's inputs: one int32 array, which the host writes and the device reads. No torch.

Section after section (sizes in `Sections`)::

    new rows    [new_rows, 1 + PARAMS]   row, then its record (see `row_layout`)
    new pages   [new_pages, 3]           row, index, page
    writes      [3, writes]              row, column and value of words of the rows' memories (see `row_layout`)
    given       [2, given]               row, and its last token, which a chooser outside of the engine has chosen
    decode      [decode]                 row of each decoding entry, padded with row 0 up to the bucket
    tokens      [3, tokens]              token id (-1: carry-over), row, offset within the row's piece
    samples     [samples]                index into tokens of each sampled position
    tiles       [4, tiles]               row, first query, number of queries, offset within the row's piece

Either the decode section is used (every row decodes one token), or the last three are (the step has prompts). If such
a step is captured, these three are padded: with tokens of row 0, samples of these tokens, and tiles without tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from hf_async_batching.core.row_layout import PARAMS

CARRY_OVER = -1
"""Stands for a token id: the row's last token on the device."""


class Padding(NamedTuple):
    """The sizes to which a step with prompts is padded.

    Attributes:
        tokens: Query tokens; more than the step has.
        entries: Samples and tiles of its prompts.
        decodes: Tokens, samples and tiles of its decoding rows, which come first.
    """

    tokens: int
    entries: int
    decodes: int = 0

    @property
    def sections(self) -> Sections:
        """Sizes of the sections, if there were no others."""
        count = self.decodes + self.entries
        return Sections(tokens=self.tokens, samples=count, tiles=count, decodes=self.decodes)


class Sections(NamedTuple):
    """Sizes of the sections, in entries; for a padded step also the number of tokens reserved for decoding rows."""

    new_rows: int = 0
    new_pages: int = 0
    decode: int = 0
    tokens: int = 0
    samples: int = 0
    tiles: int = 0
    writes: int = 0
    decodes: int = 0
    given: int = 0

    @property
    def padding(self) -> Padding:
        """The padding of a step with these sections."""
        return Padding(self.tokens, self.samples - self.decodes, self.decodes)

    @property
    def total(self) -> int:
        """Length of the array."""
        return self.updates_end + self.decode + self.tokens * 3 + self.samples + self.tiles * 4

    @property
    def writes_start(self) -> int:
        """Index of the first write to the rows' memories."""
        return self.new_rows * (1 + PARAMS) + self.new_pages * 3

    @property
    def updates_end(self) -> int:
        """Index at which the updates of the tables end, and the step's own inputs begin."""
        return self.given_start + self.given * 2

    @property
    def given_start(self) -> int:
        """Index of the first token that a chooser has chosen."""
        return self.writes_start + self.writes * 3

    @classmethod
    def largest(
        cls, *, max_rows: int, max_batch_tokens: int, num_pages: int, writes: int = 0, drafted: int = 0
    ) -> Sections:
        """Sizes that no step exceeds; `drafted` positions are sampled beyond one per row."""
        samples, tiles = max_rows + drafted, max_batch_tokens + max_rows
        return cls(max_rows, num_pages, max_rows, max_batch_tokens, samples, tiles, writes, given=max_rows)


NO_PADDING = Padding(0, 0)
