"""A request that is being served: CPU bookkeeping, no tensors."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import NamedTuple

from hf_async_batching.core.logits_params import Stage
from hf_async_batching.core.prefix_keys import shifted_key
from hf_async_batching.core.request import Request
from hf_async_batching.core.row_layout import RULE_WORDS
from hf_async_batching.kv_cache.sequence_pages import SequencePages
from hf_async_batching.scheduler.prompt_lookup import PromptLookup


class State(enum.Enum):
    """The states of a sequence."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    VERIFYING = "verifying"
    FINISHED = "finished"


class Needs(NamedTuple):
    """What a request's steps need of the device beyond arg-max, the usual filters and log-probabilities.

    Attributes:
        top_k: See `SamplingParams.top_k_class`; 0 if no token is drawn.
        stages: Rare changes of the logits.
        penalty: Whether it has a repetition penalty.
        seen: Whether it depends on which tokens have occurred.
        memory: Whether it reads the row's memory.
        offers: Whether its logits go to a chooser outside the engine.
        scores: Whether scores are returned.
        logits: Whether logits are returned.
        fixed_writes: Words written to its row's memory when it starts.
    """

    top_k: int
    stages: int
    penalty: bool
    seen: bool
    memory: bool
    offers: bool
    scores: bool
    logits: bool
    fixed_writes: int

    @property
    def forbids_drafts(self) -> bool:
        """Whether a choice depends on earlier tokens beyond the logits, or a token brings more than itself."""
        return bool(self.stages or self.seen or self.memory or self.offers or self.scores or self.logits)

    @classmethod
    def of(cls, request: Request) -> Needs | None:
        """The needs of a request; None if it has none."""
        params, sampling = request.logits, request.sampling
        offers = request.chooser is not None
        stages = Stage(0) if offers else params.stages | sampling.stages
        if not request.output_scores:
            stages &= ~Stage.RENORMALIZE  # it shifts all scores by the same amount
        seen, memory = not offers and params.needs_seen, not offers and params.needs_memory
        needs = cls(
            top_k=sampling.top_k_class if sampling.do_sample and not offers else 0,
            stages=int(stages),
            penalty=not offers and params.repetition_penalty != 1.0,
            seen=seen,
            memory=memory,
            offers=offers,
            scores=request.output_scores,
            logits=request.output_logits,
            fixed_writes=len(request.padding) + len(params.rules) * RULE_WORDS if seen or memory else 0,
        )
        return needs if any(needs) else None


@dataclass(slots=True, eq=False)
class Sequence:
    """A request, its row and pages, and its progress.

    Besides its known tokens it has placeholders: tokens that a step in flight is about to sample, whose values only
    the device knows.

    Attributes:
        request: The request.
        arrival: Order of arrival; smaller is older.
        request_id: Id of the request.
        tokens: Prompt and settled output tokens.
        eos: End-of-sequence tokens of the request.
        min_length: Length, prompt included, below which no end-of-sequence token may follow.
        max_length: Length, prompt included, at which it ends.
        candidates: What drawing its tokens needs (see `SamplingParams.candidates`); None if no token is drawn.
        logprobs: Whether to return log-probabilities.
        has_chooser: Whether a chooser outside the engine chooses its tokens.
        awaits_choice: Whether its chooser has its logits and has not chosen yet.
        needs: Further needs of its steps on the device; None for the many requests without any.
        state: Its state.
        num_planned: Number of its tokens and placeholders.
        num_computed: Number of leading tokens whose keys and values a planned step writes. While it decodes: all
            planned tokens except the last.
        next_page_at: For a decoding sequence, the value of `num_computed` at which it needs a page or has reached its
            length; until then each step is like the previous one.
        pages: Its row and its KV pages.
        last_step: Number of the last planned step that uses the row or the pages; -1 for none.
        lookup: Source of its drafts; None if it makes none.
        paused: Whether it stops decoding until its tokens in flight have arrived, or its chooser has chosen.
        draft: Drafted tokens after its last token that are computed now or next.
        restarts: Whether it continues from another position than the device's tables hold for its row.
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
    has_chooser: bool = field(init=False)
    awaits_choice: bool = False
    needs: Needs | None = field(init=False)
    state: State = State.WAITING
    num_planned: int = field(init=False)
    num_computed: int = 0
    next_page_at: int = 0
    pages: SequencePages = field(init=False)
    last_step: int = -1
    lookup: PromptLookup | None = field(init=False)
    paused: bool = False
    draft: tuple[int, ...] = ()
    restarts: bool = False
    _prefix_keys: list[int] | None = field(init=False)

    def __post_init__(self) -> None:
        self.request_id = self.request.request_id
        self.tokens = list(self.request.prompt)
        self.eos = frozenset() if self.request.chooser is not None else frozenset(self.request.eos_token_ids)
        self.num_planned = len(self.tokens)
        self.has_chooser = outside = self.request.chooser is not None
        self.min_length = 0 if outside else len(self.request.prompt) + self.request.min_new_tokens
        self.max_length = len(self.request.prompt) + self.request.max_new_tokens
        sampling = self.request.sampling
        # A chooser draws and filters tokens and computes probabilities itself.
        self.candidates = sampling.candidates if sampling.do_sample and not outside else None
        self.logprobs = sampling.logprobs and not outside
        keys = self.request.prefix_keys
        self._prefix_keys = None if keys is None else list(keys)
        plain = self.request.prompt_embeddings is None
        self.pages = SequencePages(shareable=plain or keys is not None)
        self.needs = Needs.of(self.request)
        self.lookup = None
        if self.request.lookup_tokens and plain and not (self.needs and self.needs.forbids_drafts):
            self.lookup = PromptLookup(self.request.lookup_tokens, self.request.lookup_ngram, self.eos)

    @property
    def row(self) -> int:
        """Its row on the device; 0 while it has none."""
        return self.pages.row

    @property
    def prefix_tokens(self) -> Tokens[int]:
        """The tokens by which the prefix cache knows the sequence's pages: its own, or the keys in their place."""
        keys = self._prefix_keys
        if keys is None:
            return self.tokens
        if len(keys) < len(self.tokens):
            shifts = self.request.position_shifts
            keys += [shifted_key(token, shifts) for token in self.tokens[len(keys) :]]
        return keys

    @property
    def placeholders(self) -> int:
        """Output tokens that steps in flight will deliver."""
        return self.num_planned - len(self.tokens)

    @property
    def wants_more(self) -> bool:
        """Whether another step must be planned while it decodes: an end by length is known before its last token."""
        return self.num_planned < self.max_length

    @property
    def num_cacheable(self) -> int:
        """Leading tokens whose keys and values other sequences may use."""
        # The last known output may be an end, and no step need ever write its keys and values.
        return min(self.num_computed, max(len(self.request.prompt), len(self.tokens) - 1))

    def writes(self, start: int) -> int:
        """Words written to the row's memory in the step in which it starts after `start` known tokens."""
        needs = self.needs
        if needs is None or not (needs.seen or needs.memory):
            return 0
        return needs.fixed_writes + start

    def set_next_page(self, room: int) -> None:
        """Set `next_page_at` of a decoding sequence whose pages have room for `room` tokens."""
        self.next_page_at = min(room, self.max_length - 1)
