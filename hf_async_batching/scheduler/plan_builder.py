"""Collect the work of a step, and build its plan. No torch, no threads."""

from __future__ import annotations

from typing import NamedTuple

from hf_async_batching.core.plan import (
    NO_BOUNDS,
    Bounds,
    Chunk,
    Features,
    Given,
    NewPage,
    NewRow,
    Offer,
    Plan,
    Run,
    StateCopy,
)
from hf_async_batching.scheduler.sequence import Sequence
from hf_async_batching.scheduler.speculation import DraftInFlight
from hf_async_batching.scheduler.step_features import features_of, rare_needs


class PlannedStep(NamedTuple):
    """A plan, and the values that settling its result needs.

    Attributes:
        plan: The plan.
        sampled: The sequence of each sampled position, in the plan's order.
        drafts: The drafts that the step computes.
    """

    plan: Plan
    sampled: list[Sequence]
    drafts: tuple[DraftInFlight, ...]


class PlanBuilder:
    """Builds one plan after another. Values that stay the same from step to step are computed once.

    Attributes:
        given: Tokens for the next step that choosers outside the engine have chosen.
        new_rows: Rows that start with the step.
        new_pages: Page-table entries that start with the step.
        state_copies: Copies of states before the step; each belongs to a new row, a new page or a prompt piece.
        chunks: The step's prompt pieces.
        prefilled: The sequence of each prompt piece.
    """

    def __init__(self) -> None:
        self.given: list[Given] = []
        self._step = 0
        # Inputs of the previous step, and values derived from them.
        self._decoding: list[Sequence] = []
        self._decode_rows: tuple[int, ...] = ()
        self._decode_context = 0
        self._sampled: list[Sequence] = []
        self._had_prefills = False
        self._features = Features()
        self.new_rows: list[NewRow] = []
        self.new_pages: list[NewPage] = []
        self.state_copies: list[StateCopy] = []
        self.chunks: list[Chunk] = []
        self.prefilled: list[Sequence] = []

    def begin(self) -> None:
        """Begin an empty step. Given tokens stay until a step takes them."""
        if self.new_pages or self.chunks:  # every new row has both
            self.new_rows, self.new_pages, self.state_copies, self.chunks, self.prefilled = [], [], [], [], []

    def add_chunk(self, sequence: Sequence, chunk: Chunk) -> None:
        """Add a piece of a sequence's prompt, or a draft."""
        self.chunks.append(chunk)
        self.prefilled.append(sequence)

    def build(self, decoding: list[Sequence]) -> PlannedStep:
        """Build the plan of the collected step, and advance its sequences.

        Args:
            decoding: Sequences that decode one token each. The same list object as in the previous step means the
                same sequences; the caller never changes a list that it has passed.
        """
        step, chunks, prefilled = self._step, self.chunks, self.prefilled
        self._decode_context += len(
            decoding
        )  # one token more in each row, where the rows are those of the step before
        if decoding is not self._decoding:
            self._decoding = decoding
            self._decode_context = sum([sequence.num_computed + 1 for sequence in decoding])
            rows = tuple([sequence.row for sequence in decoding])
            if rows != self._decode_rows:
                self._decode_rows = rows
        for sequence in decoding:
            sequence.num_computed += 1
            sequence.num_planned += 1
            sequence.last_step = step
        sampled = decoding
        drafts: tuple[DraftInFlight, ...] = ()
        context = self._decode_context
        if chunks:
            for sequence, chunk in zip(prefilled, chunks, strict=True):
                sequence.num_planned += chunk.samples
                sequence.last_step = step
                context += sequence.num_computed
            if any([chunk.samples for chunk in chunks]):
                sampled, drafts = self._with_chunks(decoding)
        # A minimum length expires as tokens are planned; other features change only with the sequences.
        if prefilled or self._had_prefills or sampled is not self._sampled or self._features.min_length:
            self._sampled, self._had_prefills = sampled, bool(prefilled)
            self._features = features_of(sampled, prefilled)
        offers: tuple[Offer, ...] = ()
        wanted: tuple[Run, ...] = ()
        bounds: Bounds = NO_BOUNDS
        if self._features.eager:
            offers, wanted, bounds = rare_needs(sampled)
        plan = Plan(
            step,
            self._decode_rows,
            tuple(chunks),
            tuple(self.new_rows),
            tuple(self.new_pages),
            self._features,
            context,
            tuple(self.given),
            offers,
            wanted,
            bounds,
            tuple(self.state_copies),
        )
        self._step += 1
        self.given.clear()
        return PlannedStep(plan, sampled, drafts)

    def _with_chunks(self, decoding: list[Sequence]) -> tuple[list[Sequence], tuple[DraftInFlight, ...]]:
        """The sequences of all sampled positions, and the drafts among them."""
        sampled = decoding[:]
        drafts: list[DraftInFlight] = []
        for sequence, chunk in zip(self.prefilled, self.chunks, strict=True):
            if chunk.samples > 1:
                drafts.append(DraftInFlight(sequence, len(sampled), sequence.draft))
            sampled += [sequence] * chunk.samples
        return sampled, tuple(drafts)

    def let_go(self) -> None:
        """Drop references to sequences of earlier steps."""
        self.begin()
        self._decoding, self._sampled = [], []
