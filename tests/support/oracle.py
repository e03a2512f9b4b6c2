"""Drafts for the toy model, as good as one likes: what prompt lookup would find in no random text."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hf_async_batching.core.request import Request
from hf_async_batching.scheduler.prompt_lookup import PromptLookup
from support.toy_engine import VOCAB, reference


class Oracle(PromptLookup):
    """Knows what follows, and is wrong at a random place every other time."""

    rng = random.Random(0)
    window: int | None = None

    def find(self, tokens: Sequence[int], limit: int) -> tuple[int, ...]:
        length = min(limit, self._num_tokens)
        if length < 1 or self.rng.random() < 0.2:
            return ()
        draft = reference(Request("what follows", tuple(tokens), length), window=self.window)
        if self.rng.random() < 0.5:
            place = self.rng.randrange(length)
            draft[place] = (draft[place] + 1) % VOCAB
        end = next((i for i, token in enumerate(draft) if token in self._ends), length)
        return tuple(draft[:end])
