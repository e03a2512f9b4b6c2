"""The outcome of a peer's run of a workload."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hf_async_batching.bench.measure import Spread


@dataclass(slots=True)
class PeerRun:
    """A peer's run of a workload, or the reason why it failed.

    Attributes:
        name: "generate_batch" or "generate".
        attention: The attention implementation of the model during the run; None if nothing ran.
        settings: The peer's settings.
        notes: What a reader must know about the figure: failed attempts, and generated tokens that were not requested.
        error: Why there is no figure.
        seconds: From the first request to the last token, of the median pass.
        output_tokens: Generated tokens that were requested.
        output_tokens_per_second: `output_tokens` over `seconds`.
        total_tokens_per_second: Prompt and output tokens over `seconds`.
        first_token_seconds: From a request's arrival to its first token; None if the peer does not report it.
        peak_bytes: Peak of all allocated memory; None on the CPU.
        equal_to_first_run: Share of completions equal to those of our first run, token for token; None until compared.
        tokens: New tokens by request id; not part of the JSON.
    """

    name: str
    attention: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    seconds: float | None = None
    output_tokens: int | None = None
    output_tokens_per_second: float | None = None
    total_tokens_per_second: float | None = None
    first_token_seconds: Spread | None = None
    peak_bytes: int | None = None
    equal_to_first_run: float | None = None
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: value for name, value in asdict(self).items() if name != "tokens"}


@dataclass(slots=True)
class Pass:
    """One pass of a workload by a peer: the fields of `Served` that a peer reports."""

    seconds: float = 0.0
    tokens: dict[str, list[int]] = field(default_factory=dict)
    first_token_seconds: list[float] = field(default_factory=list)


def short(error: BaseException) -> str:
    """Write an error on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"
