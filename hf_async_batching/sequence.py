"""A request while it is being served: CPU bookkeeping, no tensors."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from hf_async_batching.prefix_cache import Node
from hf_async_batching.request import Request


class State(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request, its row and pages, and how far it has come.

    Beside its known tokens it has placeholders: tokens that a step in flight is about to sample, whose values only the
    device knows.

    Attributes:
        request: What was asked.
        arrival: Order of arrival; smaller is older.
        tokens: Prompt and settled output tokens.
        eos: The request's end-of-sequence tokens.
        placeholders: Output tokens that steps in flight will deliver.
        computed: Leading tokens whose keys and values some planned step writes.
        row: The row on the device; 0 while the sequence has none.
        pages: KV pages in order of position.
        prefix: The last page of its chain in the prefix cache; None before the first look-up.
        last_step: Number of the last planned step that touches the row or the pages; -1 for none.
    """

    request: Request
    arrival: int
    tokens: list[int] = field(init=False)
    eos: frozenset[int] = field(init=False)
    state: State = State.WAITING
    placeholders: int = 0
    computed: int = 0
    row: int = 0
    pages: list[int] = field(default_factory=list)
    prefix: Node | None = None
    last_step: int = -1

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.eos = frozenset(self.request.eos_token_ids)

    @property
    def num_output(self) -> int:
        """Settled output tokens."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def wants_more(self) -> bool:
        """Whether another step must be planned: a stop by length is known before its last token is."""
        return self.num_output + self.placeholders < self.request.max_new_tokens
