"""Prompts that are given as embeddings: soft prompts, and the embeddings of images.

The prompt of such a request holds token ids, which are never looked up, and its embeddings. Its completion consists of
tokens as usual. A step that computes a piece of the prompt passes embeddings to the forward in place of token ids, and
the positions of pictures where positions have several dimensions.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from hf_async_batching.core.plan import Plan
from hf_async_batching.inputs.prompts import MediaInputs
from hf_async_batching.model.forward.step_inputs import PromptPiece


class PromptEmbeddings:
    """The rows whose prompts are embeddings, and the progress of each prompt; used by the device's side of a step."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[MediaInputs, int]] = {}
        # Kept alive until the step that reads them has completed, even if its request ends earlier.
        self._read: deque[tuple[int, MediaInputs]] = deque()

    def pieces(self, plan: Plan) -> tuple[PromptPiece, ...]:
        """The places in a step where embeddings replace tokens."""
        for new_row in plan.new_rows:
            given: Any = new_row.request.prompt_embeddings
            if given is not None:
                self._rows[new_row.row] = (MediaInputs.of(given), new_row.start)
            elif self._rows:
                self._rows.pop(new_row.row, None)
        if not self._rows:
            return ()
        pieces: list[PromptPiece] = []
        query = len(plan.decode_rows)
        for chunk in plan.chunks:
            if chunk.row in self._rows:
                inputs, start = self._rows.pop(chunk.row)
                end = start + len(chunk.tokens)
                if start < len(inputs.embeddings):
                    # A request that was preempted after its first tokens has tokens after its embeddings.
                    pieces.append(_piece(query, inputs, start, end))
                    self._read.append((plan.step, inputs))
                if not chunk.samples:
                    self._rows[chunk.row] = (inputs, end)
            query += len(chunk.tokens)
        return tuple(pieces)

    def concerns(self, plan: Plan) -> bool:
        """Whether a step might read embeddings if it came next."""
        return any(new_row.request.prompt_embeddings is not None for new_row in plan.new_rows) or (
            bool(self._rows) and any(chunk.row in self._rows for chunk in plan.chunks)
        )

    def completed(self, step: int) -> None:
        """Drop embeddings that only steps up to `step` have read."""
        while self._read and self._read[0][0] <= step:
            self._read.popleft()


def _piece(query: int, inputs: MediaInputs, start: int, end: int) -> PromptPiece:
    positions = None if inputs.positions is None else inputs.positions[:, start:end]
    layers = tuple(layer[start:end] for layer in inputs.layers)
    return PromptPiece(query, inputs.embeddings[start:end], positions, layers, inputs.merged)
