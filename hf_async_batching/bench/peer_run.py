"""What a peer's run of a workload comes back with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hf_async_batching.bench.measure import Spread


@dataclass(slots=True)
class PeerRun:
    """A peer's run of a workload, or why there is none.

    Attributes:
        name: "generate_batch" or "generate".
        attention: What the model's attention was set to while it ran; None where nothing ran.
        settings: How it was set up.
        notes: What a reader must know of the figure: attempts that failed, tokens that were made for nothing.
        error: Why there is no figure.
        seconds: From the first request to the last token, of the median pass.
        output_tokens: Tokens that were asked for and generated.
        output_tokens_per_second: These over `seconds`.
        total_tokens_per_second: Prompt tokens included.
        first_token_seconds: From a request's arrival to its first token, where the peer tells.
        peak_bytes: Largest memory allocated, everything included; None on the CPU.
        equal_to_first_run: Share of completions that our first run made too, token for token, once they were compared.
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
    """One pass of a workload: as `Served`, of what a peer tells."""

    seconds: float = 0.0
    tokens: dict[str, list[int]] = field(default_factory=dict)
    first_token_seconds: list[float] = field(default_factory=list)


def short(error: BaseException) -> str:
    """An error on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"
