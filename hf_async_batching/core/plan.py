"""The three immutable values between host and device: what to run, what was enqueued, what came back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hf_async_batching.core.request import Request


class Chunk(NamedTuple):
    """A piece of a prompt: `tokens` go to the positions after those that the row has already computed.

    `samples` is the number of positions at its end that yield a token: 0; 1 for the last piece of a prompt; or all, if
    `tokens` are a request's last token and a draft.
    """

    row: int
    tokens: tuple[int, ...]
    samples: int


class NewRow(NamedTuple):
    """A row that a request takes over in this step; the device tables of the row are set from `request`.

    `start` is the number of its tokens that its pages already hold: the first piece of its prompt starts there.
    `known` holds these tokens if the row's memory needs them. `again` says that the row's own request continues from
    another position than the tables hold.
    """

    row: int
    request: Request
    start: int = 0
    known: tuple[int, ...] = ()
    again: bool = False


class NewPage(NamedTuple):
    """Page `page` becomes the `ordinal`-th page of `row`; the groups' pages of one position follow each other."""

    row: int
    ordinal: int
    page: int


class StateCopy(NamedTuple):
    """The states of `source` are copied to `target`, before the step's forward.

    A number above 0 is a row, one below 0 a snapshot: `-1` is the first place for snapshots.
    """

    source: int
    target: int


class Given(NamedTuple):
    """`token` becomes the last token of `row`: a chooser outside the engine has chosen it."""

    row: int
    token: int


class Offer(NamedTuple):
    """The logits at one sampled position go to a request's chooser; `sampled` is the index of the position."""

    sampled: int
    request_id: str


class Run(NamedTuple):
    """Consecutive sampled positions from `start` up to `stop`, and their owner."""

    start: int
    stop: int
    request_ids: tuple[str, ...]


class Bounds(NamedTuple):
    """Sizes that no sampled row of the step exceeds, so that the device need not report them.

    `history` counts tokens before the new one, padding included; `ngram` is the size of the longest n-gram.
    """

    history: int = 0
    rules: int = 0
    ngram: int = 0


NO_BOUNDS = Bounds()


@dataclass(frozen=True, slots=True)
class Features:
    """Work of the sampler beyond the arg-max.

    Each combination with its own work (see `Sampler.as_run`) has its own CUDA graph. For combinations with rare parts
    (`eager`) only the forward is captured.

    Attributes:
        sampling: A row draws its token.
        candidates: Number of largest logits that decide every row's filters: 0 for none, -1 for all.
        min_length: A row may not end yet.
        logprobs: A row wants the log-probabilities of its tokens.
        top_k: The largest `SamplingParams.top_k_class` of a row that draws; -1 is the largest of all.
        seen: A row of the step, sampled or not, records which tokens have occurred.
        penalty: A row has a repetition penalty.
        stages: Rare changes of the logits, as bits of `logits_params.Stage`.
        memory: A row of the step, sampled or not, keeps its history.
        offers: The logits of a row go to a chooser outside the engine.
        scores: A row wants its scores.
        logits: A row wants its logits.
    """

    sampling: bool = False
    candidates: int = 0
    min_length: bool = False
    logprobs: bool = False
    top_k: int = 0
    seen: bool = False
    penalty: bool = False
    stages: int = 0
    memory: bool = False
    offers: bool = False
    scores: bool = False
    logits: bool = False

    @property
    def eager(self) -> bool:
        """Whether the work after the forward is too rare to be captured, or cannot be captured."""
        return bool(self.stages) or self.memory or self.offers or self.scores or self.logits


@dataclass(frozen=True, slots=True)
class Plan:
    """One step.

    Attributes:
        step: Number of the step, counting from 0.
        decode_rows: Rows that decode one token each. Their input token is a placeholder: the device takes the token
            that the sampler wrote for the row in an earlier step. If nothing changed, it is the same tuple object as
            in the previous plan, so that unchanged rows are not sent again.
        chunks: Prompt pieces.
        new_rows: Rows that start with this step.
        new_pages: Page-table entries that start with this step.
        features: Work of the sampler.
        given: Tokens that choosers outside the engine have chosen for rows of this step.
        offers: Logits that go to choosers, in the order of the sampled positions.
        wanted: Sampled positions whose scores or logits are returned.
        bounds: Size limits for rare features.
        context_tokens: Tokens whose keys and values the step reads, over all of its rows.
        state_copies: Copies of states, to make in this order; empty for models without states.
    """

    step: int
    decode_rows: tuple[int, ...]
    chunks: tuple[Chunk, ...] = ()
    new_rows: tuple[NewRow, ...] = ()
    new_pages: tuple[NewPage, ...] = ()
    features: Features = field(default_factory=Features)
    context_tokens: int = 0
    given: tuple[Given, ...] = ()
    offers: tuple[Offer, ...] = ()
    wanted: tuple[Run, ...] = ()
    bounds: Bounds = NO_BOUNDS
    state_copies: tuple[StateCopy, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Query tokens of the step."""
        return len(self.decode_rows) + sum(len(chunk.tokens) for chunk in self.chunks)

    def num_tiles(self, size: int) -> int:
        """Tiles of at most `size` query tokens: one per decode row, then those of the chunks."""
        return len(self.decode_rows) + sum(-(-len(chunk.tokens) // size) for chunk in self.chunks)

    @property
    def num_prompt_tokens(self) -> int:
        """Query tokens of prompts, and of requests that are computed again."""
        again = {new_row.row for new_row in self.new_rows if new_row.again}
        return sum(len(chunk.tokens) for chunk in self.chunks if chunk.row not in again)

    @property
    def drafts(self) -> bool:
        """Whether the step has drafts."""
        return any(chunk.samples > 1 for chunk in self.chunks)

    @property
    def num_wanted(self) -> int:
        """Sampled positions whose scores or logits are returned."""
        return sum(run.stop - run.start for run in self.wanted)

    @property
    def num_sampled(self) -> int:
        """Tokens that the step samples: one per decode row, then those of the chunks, in this order."""
        return len(self.decode_rows) + sum(chunk.samples for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Launch:
    """A step that has been enqueued.

    Attributes:
        plan: The step.
        events: The device's events by name (`h2d_start`, `h2d_done`, `compute_start`, `compute_done`, `d2h_start`,
            `d2h_done`); the events of the copy to the device are absent if there was nothing to send.
        planned_at: Host time in seconds at which planning of the step began.
        launched_at: Host time in seconds at which the last of the step's work was enqueued.
    """

    plan: Plan
    events: dict[str, Any]
    planned_at: float
    launched_at: float


class Result(NamedTuple):
    """What a step sampled, in the order of `Plan.num_sampled`.

    `tokens` are outcomes (see `outcomes`). `logprobs` is None if not requested. `scores` and `logits` hold one row of
    host memory per position of `Plan.wanted`, in order, if requested. `offered` is float32 [offers, vocab] on the
    device, the logits of `Plan.offers`; None if there are none.
    """

    step: int
    tokens: list[int]
    logprobs: list[float] | None = None
    scores: Any = None
    logits: Any = None
    offered: Any = None
