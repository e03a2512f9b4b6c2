"""Which sizes steps are padded to, so that each can be captured once as a CUDA graph. No torch.

Matrix products take their rows in tiles of 64 or 128, so the first few tokens beyond a multiple cost almost as much as
a whole tile: on an H100 the products of an 8B model take 6.8 ms for 256 tokens, 7.3 for 264 and 8.0 for 384.
"""

from __future__ import annotations

import bisect

from hf_async_batching.core.step_layout import Padding

SPREAD_TOKENS = 384
"""Query tokens that a step is filled up to where prompts are spread over decode steps, its padding included.

Up to there a further token costs about half of what it costs in a step full of prompts (on an H100, 8 to 9 against 18
microseconds of products in an 8B model); from there to 512, 12.
"""

# Sizes of steps with prompts. A larger step takes the device longer than launching its kernels takes the host.
PADDED_TOKENS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, SPREAD_TOKENS, 512, 768, 1024)
_PADDED_ENTRIES = (16, 64)
# Room for padding in a full step: one token that padded samples point to, and entries for rows that decode.
_ROOM = 32
MOST_PADDED = PADDED_TOKENS[-1] + _ROOM

# With weights of this many bytes, computing `MOST_PADDED` tokens takes about as long as launching the kernels.
_PADDED_WEIGHTS = 16e9


def decode_buckets(max_rows: int) -> list[int]:
    """Sizes of decode steps that get a graph: 1, 2, 4, 8, then steps of 8 to 64, 16 to 128, 32 above."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_rows + 32, 32)]
    return [*[size for size in sizes if size < max_rows], max_rows]


def padded_decodes(max_rows: int) -> list[int]:
    """How many rows that decode a captured step with prompts has room for: 0, 8, then steps of 32 to 256, 128 above.

    Coarser than `decode_buckets`, since these count for each number of tokens. An entry too many costs next to
    nothing: its attention reads one token, and with few tokens the time of a step is that of reading the weights.
    """
    sizes = [0, 8, *range(32, 256, 32), *range(256, max_rows + 128, 128)]
    return [*[size for size in sizes if size < max_rows], max_rows]


def padded_entries(entries: int, most: int) -> int:
    """Samples and tiles that `entries` are padded to, of `most` at the most."""
    return next((size for size in _PADDED_ENTRIES if entries <= size < most), most)


def largest_padding(max_batch_tokens: int, max_rows: int, max_samples: int, weight_bytes: int) -> Padding:
    """The largest step with prompts that is worth capturing.

    Args:
        max_batch_tokens: Tokens of the largest step.
        max_rows: Rows that can decode in it.
        max_samples: Tokens that a step can sample.
        weight_bytes: What a step reads of the model.
    """
    worth = int(MOST_PADDED * min(1.0, _PADDED_WEIGHTS / max(weight_bytes, 1)))
    # A step that is full has room for padding, too.
    return Padding(min(worth, max_batch_tokens + _ROOM), max_samples, max_rows)


def padded_tokens(largest: Padding) -> list[int]:
    """Tokens of the steps with prompts that get a graph, of `largest_padding` at the most."""
    sizes = [tokens for tokens in PADDED_TOKENS if tokens <= largest.tokens]
    # A step with as many tokens as there can be, where that is one of the sizes itself.
    return [*sizes, largest.tokens] if largest.tokens - _ROOM in sizes else sizes


def spread_room(sizes: list[int], decoding: int) -> int:
    """Prompt tokens next to `decoding` rows in a step of `SPREAD_TOKENS`, or of the next size that leaves some room.

    Args:
        sizes: `padded_decodes` of the rows that there are.
        decoding: Rows that decode in the step.
    """
    decodes, least = sizes[bisect.bisect_left(sizes, decoding)], SPREAD_TOKENS // 8
    size = next((size for size in PADDED_TOKENS if size >= SPREAD_TOKENS and size > decodes + least), 0)
    # One token is padding: the padded samples need it to point to.
    return max(size - 1 - decodes, least)
