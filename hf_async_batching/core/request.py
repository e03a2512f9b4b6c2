"""A caller's request, in the caller's terms. This module does not know rows, pages or tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hf_async_batching.core.field_checks import check_integer, check_real
from hf_async_batching.core.logits_params import LogitsParams, Stage
from hf_async_batching.core.row_layout import MAX_PADDING, MAX_POSITION_DIMS, float32

MAX_SEED = 2**63

DEFAULT_NGRAM = 2
"""Default of `Request.lookup_ngram`, as in transformers."""

# Few sizes, because each needs its own CUDA graph.
CANDIDATE_SIZES = (64, 1024)


_REAL = ("temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn from the logits of one request.

    The filters apply in the order of transformers' own warpers: temperature, top-h, top-k, top-p, min-p, typical-p,
    epsilon, eta.

    Attributes:
        do_sample: Draw at random; otherwise take the arg-max and ignore all other fields except `logprobs`.
        temperature: Divides the logits; a finite 32-bit number > 0.
        top_k: Keep the k most probable tokens (ties with the k-th are kept); 0 switches it off.
        top_p: Keep the smallest set of tokens whose probability exceeds `top_p`, in [0, 1], and tokens as probable as
            its last; 1 switches it off.
        min_p: Drop tokens less probable than `min_p` times the most probable one, in [0, 1]; 0 switches it off.
        seed: Integer from 0 up to 2**63 - 1. Draws depend on it, and on nothing else that is in the batch.
        logprobs: Also return the log-probability of each chosen token under the unfiltered distribution.
        top_h: Keep the most probable tokens up to this share of the entropy, in (0, 1]; 0 switches it off.
        typical_p: Keep the tokens of the most typical information content up to this mass, in (0, 1]; 1 switches it
            off.
        epsilon_cutoff: Drop tokens less probable than this, in [0, 1); 0 switches it off.
        eta_cutoff: Drop tokens less probable than a bound that follows the entropy, in [0, 1); 0 switches it off.

    Raises:
        TypeError: A field is not a number; the message names it.
        ValueError: A field is out of range; the message names it.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    logprobs: bool = False
    top_h: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0

    def __post_init__(self) -> None:
        for name in _REAL:
            check_real(name, getattr(self, name))
        check_integer("seed", self.seed, most=MAX_SEED - 1)
        check_integer("top_k", self.top_k)
        if not 0 < self.temperature < math.inf or math.isinf(float32(self.temperature)):
            raise ValueError(
                f"`temperature` must be a finite 32-bit number above 0, got {self.temperature}; "
                "for the most probable token pass do_sample=False instead"
            )
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"`top_p` must be in [0, 1], got {self.top_p}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"`min_p` must be in [0, 1], got {self.min_p}")
        if not 0.0 <= self.top_h <= 1.0:
            raise ValueError(f"`top_h` must be in (0, 1], got {self.top_h}")
        if not 0.0 < self.typical_p <= 1.0:
            raise ValueError(f"`typical_p` must be in (0, 1], got {self.typical_p}")
        for name in ("epsilon_cutoff", "eta_cutoff"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}")

    @property
    def candidates(self) -> int:
        """Number of largest logits that decide the filters: 0 for none, -1 for the whole vocabulary."""
        if 0 < self.top_k <= CANDIDATE_SIZES[-1]:
            return next(size for size in CANDIDATE_SIZES if self.top_k <= size)
        if self.top_k or self.top_p < 1:
            return -1
        return CANDIDATE_SIZES[0] if self.min_p else 0

    @property
    def top_k_class(self) -> int:
        """The size that bounds `top_k`: 0 if it is off, -1 if it is above all `CANDIDATE_SIZES`."""
        if not self.top_k:
            return 0
        return next((size for size in CANDIDATE_SIZES if self.top_k <= size), -1)

    @property
    def stages(self) -> Stage:
        """The filters beyond temperature, top-k, top-p and min-p."""
        stages = Stage(0)
        if self.do_sample:
            for wanted, stage in (
                (self.top_h > 0, Stage.TOP_H),
                (self.typical_p < 1, Stage.TYPICAL),
                (self.epsilon_cutoff > 0, Stage.EPSILON),
                (self.eta_cutoff > 0, Stage.ETA),
            ):
                if wanted:
                    stages |= stage
        return stages


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, and the rules for its completion and its end.

    Attributes:
        request_id: Unique among the requests of one manager.
        prompt: Token ids, at least one.
        max_new_tokens: Number of new tokens after which the request stops ("length"); at least 1.
        min_new_tokens: Number of new tokens before which no end-of-sequence token is chosen.
        eos_token_ids: Any of these ends the request ("eos"); the token itself is part of the output.
        sampling: How tokens are drawn.
        logits: Changes of the logits before that.
        padding: Tokens in front of the prompt that the model does not see but n-grams and rules do, as in `generate`;
            at most `row_layout.MAX_PADDING`, the last ones.
        chooser: An object outside the engine that chooses the request's tokens from each step's logits, in place of
            `logits` and `sampling`; opaque here (see `token_chooser`).
        group: Name shared by the requests of one call whose chooser needs all their logits in each step; None if the
            request advances independently.
        output_scores: Whether to return the scores from which tokens are chosen.
        output_logits: Whether to return the model's own logits.
        lookup_tokens: Number of tokens that a step may draft by copying earlier ones (see `prompt_lookup`); 0 for
            none. The request's tokens do not depend on it.
        lookup_ngram: Largest number of last tokens that are searched in earlier tokens; at least 1.
        prompt_embeddings: Embeddings that the device computes with in place of the prompt's tokens; opaque here.
        position_shifts: For a model whose positions have several dimensions, how far each dimension of a new token's
            position lies from the number of tokens before it; empty for 0 in all dimensions. At most
            `row_layout.MAX_POSITION_DIMS`.
        prefix_keys: Integers that identify the contents of the prompt's pages in place of its tokens; None if the
            tokens do so, or if nothing does (a prompt of embeddings without keys shares no pages).

    Raises:
        TypeError: A value is not a number; the message names it.
        ValueError: The prompt is empty, a number is out of range, or the lengths contradict each other.
    """

    request_id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    logits: LogitsParams = field(default_factory=LogitsParams)
    padding: tuple[int, ...] = ()
    chooser: Any = None
    group: str | None = None
    output_scores: bool = False
    output_logits: bool = False
    lookup_tokens: int = 0
    lookup_ngram: int = DEFAULT_NGRAM
    prompt_embeddings: object | None = field(default=None, repr=False, compare=False)
    position_shifts: tuple[int, ...] = ()
    prefix_keys: tuple[int, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self.padding) > MAX_PADDING:
            raise ValueError(f"`padding` holds at most {MAX_PADDING} tokens, got {len(self.padding)}")
        if len(self.position_shifts) > MAX_POSITION_DIMS:
            raise ValueError(f"`position_shifts` has at most {MAX_POSITION_DIMS} entries, got {self.position_shifts}")
        if self.prefix_keys is not None and len(self.prefix_keys) != len(self.prompt):
            raise ValueError("`prefix_keys` must have one entry per token of the prompt")
        if not self.prompt:
            raise ValueError("`input_ids` is empty: a prompt needs at least one token (for example the BOS token)")
        for name in ("max_new_tokens", "min_new_tokens"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"`{name}` must be an integer, got {getattr(self, name)!r}")
        if self.max_new_tokens < 1:
            raise ValueError(
                f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}; when it comes from `max_length`, "
                f"raise `max_length` above the prompt's {len(self.prompt)} tokens"
            )
        for name, least in (("lookup_tokens", 0), ("lookup_ngram", 1)):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise TypeError(f"`{name}` must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}")
        for token in self.eos_token_ids:
            if not isinstance(token, int):
                raise TypeError(f"`eos_token_ids` must be integers, got {token!r}")
        if self.min_new_tokens < 0:
            raise ValueError(f"`min_new_tokens` must not be negative, got {self.min_new_tokens}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"`min_new_tokens` ({self.min_new_tokens}) is larger than the number of tokens that may be generated "
                f"({self.max_new_tokens}); lower it, or raise `max_new_tokens` or `max_length`"
            )
