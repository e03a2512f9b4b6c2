"""What is done to a request's logits before a token is chosen, in the caller's terms; no torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from hf_async_batching.row_layout import MAX_PREFIX, MAX_RULES, Rule, RuleKind


class Stage(enum.IntFlag):
    """Changes of the logits that few requests ask for, in the order in which `generate` applies them.

    The repetition penalty and minimum lengths stand between them and have names of their own in `plan.Features`.
    """

    SEQUENCE_BIAS = enum.auto()
    ENCODER_REPETITION = enum.auto()
    NGRAM = enum.auto()
    ENCODER_NGRAM = enum.auto()
    BAD_WORDS = enum.auto()
    FORCED = enum.auto()
    REMOVE_INVALID = enum.auto()
    DECAY = enum.auto()
    SUPPRESS = enum.auto()
    TOP_H = enum.auto()
    TYPICAL = enum.auto()
    EPSILON = enum.auto()
    ETA = enum.auto()
    RENORMALIZE = enum.auto()


_STAGE_OF_KIND = {
    RuleKind.BIAS: Stage.SEQUENCE_BIAS,
    RuleKind.BAN: Stage.BAD_WORDS,
    RuleKind.FORCE: Stage.FORCED,
    RuleKind.SUPPRESS: Stage.SUPPRESS,
}


@dataclass(frozen=True, slots=True)
class LogitsParams:
    """Changes of the logits; the defaults change nothing.

    Attributes:
        rules: Biases, bans, forced and suppressed tokens.
        repetition_penalty: Divides positive logits of tokens that the prompt or the completion holds, multiplies
            negative ones; above 0.
        encoder_repetition_penalty: The same for tokens of the prompt, its padding included.
        no_repeat_ngram_size: No n-gram of this size occurs twice; 0 switches it off.
        encoder_no_repeat_ngram_size: No n-gram of the prompt occurs in the completion; 0 switches it off.
        decay_start: Length, prompt included, above which end-of-sequence tokens get more likely.
        decay_factor: How much more with each token; 1 switches it off.
        remove_invalid: NaN becomes 0, infinities the largest and smallest numbers.
        renormalize: Scores are log-probabilities.

    Raises:
        ValueError: A field is out of its range; the message names it.
    """

    rules: tuple[Rule, ...] = ()
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    decay_start: int = 0
    decay_factor: float = 1.0
    remove_invalid: bool = False
    renormalize: bool = False

    def __post_init__(self) -> None:
        for name in ("repetition_penalty", "encoder_repetition_penalty"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}; 1.0 switches it off")
        for name in ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}; 0 switches it off")
        if len(self.rules) > MAX_RULES:
            raise ValueError(f"at most {MAX_RULES} rules per request, got {len(self.rules)}")
        if any(len(rule.prefix) > MAX_PREFIX for rule in self.rules):
            raise ValueError(f"the prefix of a rule has at most {MAX_PREFIX} tokens")

    @property
    def stages(self) -> Stage:
        """Which of the stages the request needs."""
        stages = Stage(0)
        for rule in self.rules:
            stages |= _STAGE_OF_KIND[rule.kind]
        for wanted, stage in (
            (self.encoder_repetition_penalty != 1.0, Stage.ENCODER_REPETITION),
            (self.no_repeat_ngram_size > 0, Stage.NGRAM),
            (self.encoder_no_repeat_ngram_size > 0, Stage.ENCODER_NGRAM),
            (self.remove_invalid, Stage.REMOVE_INVALID),
            (self.decay_factor != 1.0, Stage.DECAY),
            (self.renormalize, Stage.RENORMALIZE),
        ):
            if wanted:
                stages |= stage
        return stages

    @property
    def ngram(self) -> int:
        """The longest n-gram that is looked for."""
        return max(self.no_repeat_ngram_size, self.encoder_no_repeat_ngram_size)

    @property
    def needs_memory(self) -> bool:
        """Whether the row's memory on the device is read."""
        return bool(self.rules) or self.ngram > 0

    @property
    def needs_seen(self) -> bool:
        """Whether it matters which tokens have occurred."""
        return self.repetition_penalty != 1.0 or self.encoder_repetition_penalty != 1.0
