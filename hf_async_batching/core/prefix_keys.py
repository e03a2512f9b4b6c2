"""Integers that identify the contents of a token's page entries where the token alone does not. No torch.

The prefix cache compares tokens. The keys and values of a token also depend on its position, which a picture before it
can shift, and a picture's own tokens say nothing about the picture. So such tokens have a *key*. Token ids, keys of
shifted tokens and keys of pictures never coincide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

_WORD = 1 << 32


def shifted_key(token: int, shifts: Sequence[int]) -> int:
    """The key of a token whose position differs from the number of tokens before it.

    Args:
        token: Token id, from 0 up to 2**31 - 1.
        shifts: The difference in each dimension, as int32.

    Returns:
        The token itself if all shifts are 0; else a number from 2**32 on, another one for each other argument.
    """
    key = 0
    for shift in reversed(shifts):
        key = (key << 32) | (shift % _WORD)
    return (key << 32) | token


def content_key(*contents: bytes) -> int:
    """The key of every token of a span: a negative number that depends on the span's whole contents."""
    digest = hashlib.blake2b(digest_size=16)
    for content in contents:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return -1 - int.from_bytes(digest.digest(), "little")
