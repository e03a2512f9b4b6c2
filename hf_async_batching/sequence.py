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
        request_id: The request's.
        tokens: Prompt and settled output tokens.
        eos: The request's end-of-sequence tokens.
        min_length: Tokens, prompt included, below which no end-of-sequence token may follow.
        max_length: Tokens, prompt included, at which it ends.
        candidates: What drawing its tokens needs (see `SamplingParams.candidates`); None where nothing is drawn.
        logprobs: Whether log-probabilities were asked for.
        shareable: Whether its tokens tell what its pages hold.
        planned: Its tokens and placeholders together.
        computed: Leading tokens whose keys and values some planned step writes. While it decodes: all that are planned
            but the last.
        decide_at: For a decoding sequence, the value of `computed` at which it needs a page or has reached its
            length; until then each step is like the one before.
        row: The row on the device; 0 while the sequence has none.
        pages: KV pages in order of position.
        prefix: The last page of its chain in the prefix cache; None before the first look-up.
        last_step: Number of the last planned step that touches the row or the pages; -1 for none.
    """

    request: Request
    arrival: int
    request_id: str = field(init=False)
    tokens: list[int] = field(init=False)
    eos: frozenset[int] = field(init=False)
    min_length: int = field(init=False)
    max_length: int = field(init=False)
    candidates: int | None = field(init=False)
    logprobs: bool = field(init=False)
    shareable: bool = field(init=False)
    state: State = State.WAITING
    planned: int = field(init=False)
    computed: int = 0
    decide_at: int = 0
    row: int = 0
    pages: list[int] = field(default_factory=list)
    prefix: Node | None = None
    last_step: int = -1

    def __post_init__(self) -> None:
        self.request_id = self.request.request_id
        self.tokens = list(self.request.prompt)
        self.eos = frozenset(self.request.eos_token_ids)
        self.planned = len(self.tokens)
        self.min_length = len(self.request.prompt) + self.request.min_new_tokens
        self.max_length = len(self.request.prompt) + self.request.max_new_tokens
        sampling = self.request.sampling
        self.candidates = sampling.candidates if sampling.do_sample else None
        self.logprobs = sampling.logprobs
        self.shareable = self.request.prompt_embeddings is None

    @property
    def placeholders(self) -> int:
        """Output tokens that steps in flight will deliver."""
        return self.planned - len(self.tokens)

    @property
    def wants_more(self) -> bool:
        """Whether another step must be planned while it decodes: a stop by length is known before its last token."""
        return self.planned < self.max_length

    def decide_later(self, page_size: int) -> None:
        """Set `decide_at` by the pages that it has; for a sequence that decodes."""
        self.decide_at = min(len(self.pages) * page_size, self.max_length - 1)
