"""What stands where in a row's memory on the device; no torch.

A row's memory is one line of an int32 table: first its *rules* (biases and bans of tokens, `RULE_WORDS` words each),
then its *history*, the token ids from the first one that the caller passed on, padding included.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

MAX_RULES = 256
MAX_PREFIX = 8
RULE_WORDS = 4 + MAX_PREFIX
HISTORY_START = MAX_RULES * RULE_WORDS

MAX_PADDING = 64
"""Padding tokens that are kept in front of a history: as many as an n-gram or a rule's prefix can reach."""

MAX_NGRAM = MAX_PADDING
"""The longest n-gram that the vectorised sampler compares: token by token, for all rows at once."""

MAX_INT32 = 2**31 - 1

_LARGEST_FLOAT32 = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]

# Columns of a rule; its prefix follows, the token next to the end first, filled with `ANY`.
KIND, POSITION, TOKEN, BIAS = range(4)
ANY = -1


class RuleKind(enum.IntEnum):
    """What a rule does to its token, in the order in which the kinds apply; 0 is no rule."""

    BIAS = 1
    BAN = 2
    FORCE = 3
    SUPPRESS = 4


class Rule(NamedTuple):
    """A change of one token's logit, wherever it applies.

    Attributes:
        kind: `BIAS` and `BAN` add `bias`; `FORCE` leaves no tokens but those that are forced at the same position;
            `SUPPRESS` makes the token impossible.
        token: The token.
        prefix: Tokens that must stand right before it, at most `MAX_PREFIX`.
        bias: Added to the logit.
        position: The only position of the new token at which the rule applies, counted from the prompt's first token;
            `ANY` for all.
    """

    kind: RuleKind
    token: int
    prefix: tuple[int, ...] = ()
    bias: float = float("-inf")
    position: int = ANY

    def words(self) -> list[int]:
        """The rule as it lies in a row's memory."""
        bias: int = struct.unpack("<i", struct.pack("<f", float32(self.bias)))[0]
        prefix = list(reversed(self.prefix))
        return [int(self.kind), self.position, self.token, bias, *prefix, *[ANY] * (MAX_PREFIX - len(prefix))]


def float32(value: float) -> float:
    """The number as torch takes it over into float32: infinite beyond what that holds."""
    return value if not abs(value) > _LARGEST_FLOAT32 else math.copysign(math.inf, value)


def row_writes(padding: Sequence[int], known: Sequence[int], rules: Sequence[Rule]) -> tuple[list[int], list[int]]:
    """What a new row needs in its memory, beside the tokens that its prompt pieces bring.

    Args:
        padding: What stands in front of the prompt.
        known: Leading tokens of the row that no step computes, because their pages were found.
        rules: The row's rules.

    Returns:
        Columns and values.
    """
    words = [word for rule in rules for word in rule.words()]
    columns = [*range(len(words)), *range(HISTORY_START, HISTORY_START + len(padding) + len(known))]
    return columns, [*words, *padding, *known]
