"""The sizes that steps are padded to."""

from __future__ import annotations

import itertools

from hf_async_batching.core.graph_buckets import (
    MOST_PADDED,
    PADDED_TOKENS,
    SPREAD_TOKENS,
    decode_buckets,
    largest_padding,
    padded_decodes,
    padded_entries,
    padded_tokens,
    spread_room,
)
from hf_async_batching.core.step_layout import Padding


def test_buckets_grow_to_the_largest_step() -> None:
    assert decode_buckets(1) == [1]
    assert decode_buckets(6) == [1, 2, 4, 6]
    assert decode_buckets(6, least=2) == [2, 4, 6]
    assert decode_buckets(2, least=2) == [2]
    assert decode_buckets(1, least=2) == [2], "a row alone decodes in compiled code"
    assert decode_buckets(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    for largest in (1, 5, 64, 100, 256):
        buckets = decode_buckets(largest)
        assert buckets == sorted(set(buckets))
        assert buckets[-1] == largest


def test_the_largest_step_with_prompts_that_is_worth_capturing() -> None:
    assert largest_padding(2048, 256, 320, int(1e9)) == Padding(MOST_PADDED, 320, 256)
    assert largest_padding(512, 256, 320, int(1e9)) == Padding(544, 320, 256), "a full step has room for padding"
    assert padded_tokens(Padding(544, 9, 9)) == [*PADDED_TOKENS[:12], 544]
    assert padded_tokens(Padding(700, 9, 9)) == [*PADDED_TOKENS[:12]]
    assert padded_tokens(Padding(MOST_PADDED, 9, 9)) == [*PADDED_TOKENS, MOST_PADDED]
    assert largest_padding(2048, 256, 320, int(64e9)).tokens == MOST_PADDED // 4, "large models compute longer"


def test_room_for_what_decodes_in_a_captured_step_with_prompts() -> None:
    assert padded_decodes(1) == [0, 1]
    assert padded_decodes(40) == [0, 8, 32, 40]
    assert padded_decodes(600) == [0, 8, 32, 64, 96, 128, 160, 192, 224, 256, 384, 512, 600]
    for rows in (*range(1, 300), 1000):
        sizes = padded_decodes(rows)
        assert sizes == sorted(set(sizes))
        assert all(b - a <= 32 for a, b in itertools.pairwise(sizes) if b <= 256), "_ROOM"


def test_tokens_fill_the_tiles_of_a_product() -> None:
    assert list(PADDED_TOKENS) == sorted(PADDED_TOKENS)
    assert all(size % 64 == 0 for size in PADDED_TOKENS if size > 96)
    assert SPREAD_TOKENS in PADDED_TOKENS


def test_few_sizes_of_samples_and_tiles() -> None:
    assert [padded_entries(entries, 100) for entries in (1, 16, 17, 64, 65, 100)] == [16, 16, 64, 64, 100, 100]
    assert padded_entries(3, 9) == 9, "no more than there can be"


def test_prompts_fill_a_step_up_to_its_size() -> None:
    sizes = padded_decodes(256)
    assert spread_room(sizes, 0) == SPREAD_TOKENS - 1, "one token is padding"
    assert spread_room(sizes, 8) == SPREAD_TOKENS - 9
    assert spread_room(sizes, 9) == spread_room(sizes, 32) == SPREAD_TOKENS - 33
    assert spread_room(sizes, 33) == SPREAD_TOKENS - 65
    assert spread_room(sizes, 256) == SPREAD_TOKENS - 257
    more = padded_decodes(1400)
    assert spread_room(more, 380) == 512 - 385, "the next size, where there is more room"
    assert spread_room(more, 1400) == SPREAD_TOKENS // 8, "they go on"
