"""The device's data of a row, word by word: the layout that host and device share. No torch.

A row has two lines of int32 words. Its *record* holds its parameters (`ROW_PARAMS`), floats as their bits. Its
*memory* holds first its *rules* (biases and bans of tokens, `RULE_WORDS` words each), then its *history*: the token
ids from the first one that the caller passed on, padding included.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MAX_EOS = 16
"""Number of end-of-sequence tokens in a record; a power of two, because Triton ranges need one."""

MAX_POSITION_DIMS = 5
"""Dimensions that a token's position can have: the text's, and up to four of a picture or a video."""

ROW_PARAMS = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("do_sample", np.int32),
        ("seed", np.int64),
        ("min_length", np.int32),
        ("start", np.int32),
        ("max_length", np.int32),
        ("prompt_length", np.int32),
        ("padding", np.int32),
        ("repetition_penalty", np.float32),
        ("encoder_penalty", np.float32),
        ("ngram", np.int32),
        ("encoder_ngram", np.int32),
        ("decay_start", np.int32),
        ("decay", np.float64),
        ("remove_invalid", np.int32),
        ("renormalize", np.int32),
        ("top_h", np.float32),
        ("typical_p", np.float32),
        ("epsilon", np.float32),
        ("eta", np.float32),
        ("position_shifts", np.int32, (MAX_POSITION_DIMS,)),
        ("eos", np.int32, (MAX_EOS,)),  # the last field: readers take all columns from here on
    ]
)
"""A row's parameters. The host writes the fields; the device reads the same bytes as int32 columns."""

NEW_ROW = np.dtype([("row", np.int32), *ROW_PARAMS.descr])
"""The data that the host sends for a new row: the row, then its parameters."""


def _column(field: str) -> int:
    """The first int32 column of a field of `ROW_PARAMS`."""
    fields = ROW_PARAMS.fields
    assert fields is not None
    return fields[field][1] // 4


TEMPERATURE = _column("temperature")
TOP_K = _column("top_k")
TOP_P = _column("top_p")
MIN_P = _column("min_p")
DO_SAMPLE = _column("do_sample")
SEED_LOW = _column("seed")
SEED_HIGH = SEED_LOW + 1
MIN_LENGTH = _column("min_length")
START = _column("start")
MAX_LENGTH = _column("max_length")
PROMPT_LENGTH = _column("prompt_length")
PADDING = _column("padding")
REPETITION_PENALTY = _column("repetition_penalty")
ENCODER_PENALTY = _column("encoder_penalty")
NGRAM = _column("ngram")
ENCODER_NGRAM = _column("encoder_ngram")
DECAY_START = _column("decay_start")
DECAY = _column("decay")
REMOVE_INVALID = _column("remove_invalid")
RENORMALIZE = _column("renormalize")
TOP_H = _column("top_h")
TYPICAL_P = _column("typical_p")
EPSILON = _column("epsilon")
ETA = _column("eta")
FIRST_SHIFT = _column("position_shifts")
FIRST_EOS = _column("eos")
PARAMS = ROW_PARAMS.itemsize // 4
"""int32 columns of a record."""

MAX_RULES = 256
MAX_PREFIX = 8
RULE_WORDS = 4 + MAX_PREFIX
HISTORY_START = MAX_RULES * RULE_WORDS

MAX_PADDING = 64
"""Number of padding tokens kept in front of a history: an n-gram or a rule's prefix reaches no more."""

MAX_NGRAM = MAX_PADDING
"""The longest n-gram that the vectorised sampler compares: token by token, for all rows at once."""

MAX_INT32 = 2**31 - 1

_LARGEST_FLOAT32 = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]

# Columns of a rule. Its prefix follows, from the token next to the end, filled up with `ANY`.
KIND, POSITION, TOKEN, BIAS = range(4)
ANY = -1


class RuleKind(enum.IntEnum):
    """The effect of a rule on its token, in the order in which the kinds apply; 0 is no rule."""

    BIAS = 1
    BAN = 2
    FORCE = 3
    SUPPRESS = 4


class Rule(NamedTuple):
    """A change of one token's logit at the positions where the rule applies.

    Attributes:
        kind: `BIAS` and `BAN` add `bias`; `FORCE` allows only the tokens that are forced at the same position;
            `SUPPRESS` makes the token impossible.
        token: The token.
        prefix: Tokens that must directly precede it, at most `MAX_PREFIX`.
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
        """The rule in the layout of a row's memory."""
        bias: int = struct.unpack("<i", struct.pack("<f", float32(self.bias)))[0]
        prefix = list(reversed(self.prefix))
        return [int(self.kind), self.position, self.token, bias, *prefix, *[ANY] * (MAX_PREFIX - len(prefix))]


def float32(value: float) -> float:
    """The number as float32: infinite if it is out of range."""
    return value if not abs(value) > _LARGEST_FLOAT32 else math.copysign(math.inf, value)


def row_writes(padding: Sequence[int], known: Sequence[int], rules: Sequence[Rule]) -> tuple[list[int], list[int]]:
    """The words that a new row needs in its memory, besides the tokens of its prompt pieces.

    Args:
        padding: Padding tokens in front of the prompt.
        known: Leading tokens of the row that no step computes, because their pages were found.
        rules: The row's rules.

    Returns:
        Columns and values.
    """
    words = [word for rule in rules for word in rule.words()]
    columns = [*range(len(words)), *range(HISTORY_START, HISTORY_START + len(padding) + len(known))]
    return columns, [*words, *padding, *known]
