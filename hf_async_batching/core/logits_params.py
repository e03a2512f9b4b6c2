"""Changes of a request's logits before a token is chosen, in the caller's terms; no torch."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from hf_async_batching.core.field_checks import check_integer, check_real
from hf_async_batching.core.row_layout import ANY, MAX_INT32, MAX_NGRAM, MAX_PREFIX, MAX_RULES, Rule, RuleKind


class Stage(enum.IntFlag):
    """Changes of the logits that few requests ask for, in the order in which `generate` applies them.

    The repetition penalty and minimum lengths lie between these stages and have their own names in `plan.Features`.
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


FIELDS_OF_KIND = {
    RuleKind.BIAS: "sequence_bias",
    RuleKind.BAN: "bad_words_ids",
    RuleKind.FORCE: "forced_bos_token_id` or `forced_eos_token_id",
    RuleKind.SUPPRESS: "suppress_tokens` or `begin_suppress_tokens",
}
"""The arguments from which rules are made, for messages."""

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
        repetition_penalty: Divides positive logits of tokens in the prompt or the completion, and multiplies negative
            ones; above 0.
        encoder_repetition_penalty: The same for tokens of the prompt, including its padding.
        no_repeat_ngram_size: No n-gram of this size occurs twice; up to `MAX_NGRAM`, 0 to switch it off. (`submit` and
            `generate` serve larger sizes with a processor.)
        encoder_no_repeat_ngram_size: No n-gram of the prompt occurs in the completion; up to `MAX_NGRAM`, 0 to switch
            it off.
        decay_start: Length, prompt included, above which end-of-sequence tokens become more likely.
        decay_factor: Factor per token of this increase; 1 switches it off.
        remove_invalid: Whether NaN becomes 0, and infinities the largest and smallest numbers.
        renormalize: Whether scores are log-probabilities.

    Raises:
        TypeError: A field is not a number; the message names it.
        ValueError: A field is out of range; the message names it.
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
            check_real(name, getattr(self, name))
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}; 1.0 switches it off")
        for name in ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
            check_integer(name, getattr(self, name), most=MAX_NGRAM)
        check_integer("decay_start", self.decay_start, least=-MAX_INT32)
        check_real("decay_factor", self.decay_factor)
        if not math.isfinite(self.decay_factor):
            raise ValueError(f"`decay_factor` must be finite, got {self.decay_factor}")
        if len(self.rules) > MAX_RULES:
            raise ValueError(f"at most {MAX_RULES} rules per request, got {len(self.rules)}")
        if any(len(rule.prefix) > MAX_PREFIX for rule in self.rules):
            raise ValueError(f"the prefix of a rule has at most {MAX_PREFIX} tokens")
        for rule in self.rules:
            field = FIELDS_OF_KIND[rule.kind]
            for token in (*rule.prefix, rule.token):
                check_integer(field, token)
            check_integer(f"position` of `{field}", rule.position, least=ANY)
            if math.isnan(rule.bias):
                raise ValueError(f"`{field}` must have numbers as biases, got {rule.bias}")

    @property
    def stages(self) -> Stage:
        """The stages that the request needs."""
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
        """Size of the longest n-gram that is searched."""
        return max(self.no_repeat_ngram_size, self.encoder_no_repeat_ngram_size)

    @property
    def needs_memory(self) -> bool:
        """Whether the request reads the row's memory on the device."""
        return bool(self.rules) or self.ngram > 0

    @property
    def needs_seen(self) -> bool:
        """Whether the request depends on which tokens have occurred."""
        return self.repetition_penalty != 1.0 or self.encoder_repetition_penalty != 1.0
