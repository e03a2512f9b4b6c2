"""The sequences that hold a row, sorted by what the next step does with them. No torch, no threads."""

from __future__ import annotations

from collections.abc import Iterator

from hf_async_batching.scheduler.sequence import Sequence, State


class RunningSequences:
    """Sequences that hold a row, in order of admission.

    The three sorted lists are rebuilt when they are read after a change. A list is replaced and never changed. So a
    step in flight can hold it, and the same list object means the same sequences in the same states.

    Args:
        with_drafters: Whether sequences can compute drafts.
    """

    def __init__(self, *, with_drafters: bool) -> None:
        self._sequences: list[Sequence] = []
        self._with_drafters = with_drafters
        self._outdated = False
        self._decoding: list[Sequence] = []
        self._prefilling: list[Sequence] = []
        self._drafters: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Add the sequence that was admitted last."""
        self._sequences.append(sequence)
        self._outdated = True

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended or waits again."""
        self._sequences.remove(sequence)
        self._outdated = True

    def remove_finished(self) -> None:
        """Remove all sequences that have ended."""
        finished = State.FINISHED
        self._sequences = [sequence for sequence in self._sequences if sequence.state is not finished]
        self._outdated = True

    @property
    def youngest(self) -> Sequence:
        """The sequence that was admitted last."""
        return self._sequences[-1]

    def changed(self) -> None:
        """Note that the state of a sequence has changed."""
        self._outdated = True

    @property
    def decoding(self) -> list[Sequence]:
        """Sequences that decode a token in the next step, if they get a page for it."""
        if self._outdated:
            self._sort()
        return self._decoding

    @property
    def prefilling(self) -> list[Sequence]:
        """Sequences whose prompts or drafts are not fully computed."""
        if self._outdated:
            self._sort()
        return self._prefilling

    @property
    def drafters(self) -> list[Sequence]:
        """Sequences that can compute drafts."""
        if self._outdated:
            self._sort()
        return self._drafters

    def _sort(self) -> None:
        decoding, prefilling = State.DECODING, State.PREFILLING
        self._decoding = [s for s in self._sequences if s.state is decoding and s.wants_more and not s.paused]
        self._prefilling = [s for s in self._sequences if s.state is prefilling]
        if self._with_drafters:
            self._drafters = [s for s in self._sequences if s.lookup is not None]
        self._outdated = False

    def let_go(self) -> None:
        """Drop references to sequences that have ended."""
        self._sort()

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __reversed__(self) -> Iterator[Sequence]:
        return reversed(self._sequences)

    def check_invariants(self) -> None:
        """Check each sequence's figures against its state.

        Raises:
            AssertionError: The bookkeeping is broken.
        """
        for sequence in self._sequences:
            if sequence.state is State.DECODING:
                assert sequence.num_computed + 1 == sequence.num_planned, "a token is computed by no step, or by two"
            else:
                assert not sequence.paused, "a sequence that does not decode is paused"
