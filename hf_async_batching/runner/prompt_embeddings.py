"""Prompts that are given as embeddings: soft prompts, and the embeddings of images.

The prompt of such a request holds placeholder token ids, which are never looked up, and its embeddings. Its completion
consists of tokens as usual. A step that computes a piece of the prompt passes embeddings to the forward in place of
token ids.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from hf_async_batching.core.plan import Plan


class PromptEmbeddings:
    """The rows whose prompts are embeddings, and the progress of each prompt; used by the device's side of a step."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[torch.Tensor, int]] = {}
        # Kept alive until the step that reads them has completed, even if its request ends earlier.
        self._read: deque[tuple[int, torch.Tensor]] = deque()

    def pieces(self, plan: Plan) -> tuple[tuple[int, torch.Tensor], ...]:
        """The places in a step where embeddings replace tokens: index of the first token, and [length, hidden]."""
        for new_row in plan.new_rows:
            given: Any = new_row.request.prompt_embeddings
            if given is not None:
                self._rows[new_row.row] = (given, new_row.start)
            elif self._rows:
                self._rows.pop(new_row.row, None)
        if not self._rows:
            return ()
        pieces: list[tuple[int, torch.Tensor]] = []
        query = len(plan.decode_rows)
        for chunk in plan.chunks:
            if chunk.row in self._rows:
                embeddings, start = self._rows.pop(chunk.row)
                end = start + len(chunk.tokens)
                if start < len(embeddings):
                    # A request that was preempted after its first tokens has tokens after its embeddings.
                    pieces.append((query, embeddings[start:end]))
                    self._read.append((plan.step, embeddings))
                if not chunk.samples:
                    self._rows[chunk.row] = (embeddings, end)
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
