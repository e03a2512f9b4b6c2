"""The three immutable values between host and device: what to run, what was enqueued, what came back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hf_async_batching.request import Request


class Chunk(NamedTuple):
    """A piece of a prompt: `tokens` go to the positions after those that the row has computed so far.

    `samples` is true for the last piece, whose last position yields the first new token.
    """

    row: int
    tokens: tuple[int, ...]
    samples: bool


class NewRow(NamedTuple):
    """A row that a request takes over in this step; the device tables of the row are set from `request`.

    `start` is how many of its tokens stand in its pages already: the first piece of its prompt begins there.
    """

    row: int
    request: Request
    start: int = 0


class NewPage(NamedTuple):
    """Page `page` becomes the `ordinal`-th page of `row`."""

    row: int
    ordinal: int
    page: int


@dataclass(frozen=True, slots=True)
class Features:
    """What the sampler has to do beyond the arg-max; each combination is its own CUDA graph.

    `candidates` is how many of the largest logits decide every row's filters: 0 for none, -1 for all.
    """

    sampling: bool = False
    candidates: int = 0
    min_length: bool = False
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """One step.

    Attributes:
        step: Number of the step, counting from 0.
        decode_rows: Rows that decode one token each. Their input token is a placeholder: the device takes the token
            that the sampler wrote for the row in an earlier step. The same tuple object as in the previous plan where
            nothing changed, so that unchanged rows are not sent again.
        chunks: Prompt pieces.
        new_rows: Rows that start with this step.
        new_pages: Page-table entries that start with this step.
        features: What the sampler has to do.
        context_tokens: Tokens whose keys and values the step reads, over all of its rows; for measurements only.
    """

    step: int
    decode_rows: tuple[int, ...]
    chunks: tuple[Chunk, ...] = ()
    new_rows: tuple[NewRow, ...] = ()
    new_pages: tuple[NewPage, ...] = ()
    features: Features = field(default_factory=Features)
    context_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Query tokens of the step."""
        return len(self.decode_rows) + sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def num_sampled(self) -> int:
        """Tokens that the step samples: one per decode row, then one per sampling chunk, in this order."""
        return len(self.decode_rows) + sum(chunk.samples for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Launch:
    """A step that has been enqueued.

    Attributes:
        plan: The step.
        events: The device's events by name (`h2d_start`, `h2d_done`, `compute_start`, `compute_done`, `d2h_start`,
            `d2h_done`); the copy to the device is absent where there was nothing to send.
        planned_at: Host time in seconds at which planning of the step began.
        launched_at: Host time in seconds at which the last of the step's work was enqueued.
    """

    plan: Plan
    events: dict[str, Any]
    planned_at: float
    launched_at: float


class Result(NamedTuple):
    """What a step sampled, in the order of `Plan.num_sampled`; `logprobs` is None where nobody asked for them."""

    step: int
    tokens: list[int]
    logprobs: list[float] | None = None
