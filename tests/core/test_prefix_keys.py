"""Keys of tokens: equal for equal contents, and never equal for different ones."""

from __future__ import annotations

import itertools

from hf_async_batching.core.prefix_keys import content_key, shifted_key


def test_a_token_in_its_usual_place_is_its_own_key() -> None:
    assert shifted_key(7, ()) == shifted_key(7, (0, 0, 0)) == 7


def test_each_token_and_shift_has_a_key_of_its_own() -> None:
    cases = list(itertools.product((0, 7, 2**31 - 1), (0, 1, -1, 2**31 - 1, -(2**31)), (0, 1, -1)))
    keys = [shifted_key(token, shifts) for token, *shifts in cases]
    assert len(set(keys)) == len(keys)
    shifted = [key for key, (_, *shifts) in zip(keys, cases, strict=True) if any(shifts)]
    assert min(shifted) >= 2**32, "no token id is a key of another token"


def test_contents_have_negative_keys() -> None:
    contents = [(b"",), (b"a",), (b"b",), (b"a", b"b"), (b"ab",), (b"ab", b""), (b"", b"ab")]
    keys = [content_key(*one) for one in contents]
    assert max(keys) < 0
    assert len(set(keys)) == len(keys), "where a part ends matters"
    assert content_key(b"a", b"b") == content_key(b"a", b"b")
