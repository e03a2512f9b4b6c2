"""Prompts that are given as embeddings: soft prompts, and what an image's tokens stand for.

Such a request's prompt holds token ids that nobody looks up, and its embeddings beside them; its completion is made
of tokens like any other. A step that computes a piece of it gives the forward embeddings in place of token ids.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from hf_async_batching.core.plan import Plan
from hf_async_batching.model.forward.cache_forward import CacheForward
from hf_async_batching.model.forward.packed_forward import PackedForward


class PromptEmbeddings:
    """Which rows have prompts of embeddings, and how far these have come. Part of the device's side of a step."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[torch.Tensor, int]] = {}
        # A step reads them after it was enqueued, whatever becomes of its requests by then.
        self._read: deque[tuple[int, torch.Tensor]] = deque()

    def pieces(self, plan: Plan) -> tuple[tuple[int, torch.Tensor], ...]:
        """Where in a step embeddings take the place of tokens: index of the first token, and [length, hidden]."""
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
                    # Behind them stand tokens, where the request was preempted after its first ones.
                    pieces.append((query, embeddings[start:end]))
                    self._read.append((plan.step, embeddings))
                if not chunk.samples:
                    self._rows[chunk.row] = (embeddings, end)
            query += len(chunk.tokens)
        return tuple(pieces)

    def concerns(self, plan: Plan) -> bool:
        """Whether a step that comes next may read embeddings."""
        return any(new_row.request.prompt_embeddings is not None for new_row in plan.new_rows) or (
            bool(self._rows) and any(chunk.row in self._rows for chunk in plan.chunks)
        )

    def completed(self, step: int) -> None:
        """Let go of what only steps up to `step` have read."""
        while self._read and self._read[0][0] <= step:
            self._read.popleft()


def check_embeddings(embeddings: torch.Tensor, length: int, forward: PackedForward | CacheForward) -> None:
    """Refuse embeddings that are not the model's, or not those of a prompt of `length` tokens.

    Raises:
        ValueError: Their shape or dtype is wrong.
    """
    if not isinstance(embeddings, torch.Tensor) or embeddings.layout is not torch.strided or embeddings.is_meta:
        raise ValueError(
            "`inputs_embeds` must be a dense tensor with values, got "
            f"{getattr(embeddings, 'layout', type(embeddings).__name__)} on {getattr(embeddings, 'device', None)}"
        )
    if embeddings.dim() != 2 or embeddings.shape[1] != forward.embedding_size or not embeddings.is_floating_point():
        raise ValueError(
            f"`inputs_embeds` of a prompt must be floating point [length, {forward.embedding_size}], "
            f"got {tuple(embeddings.shape)} and {embeddings.dtype}"
        )
    if len(embeddings) != length:
        raise ValueError(f"`inputs_embeds` has {len(embeddings)} positions for a prompt of {length} tokens")
