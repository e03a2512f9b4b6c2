"""The sizes to which steps are padded, so that each size is captured once as a CUDA graph. No torch.

Matrix products take their rows in tiles of 64 or 128, so the first few tokens beyond a multiple cost almost as much as
a whole tile: on an H100 the products of an 8B model take 6.8 ms for 256 tokens, 7.3 for 264 and 8.0 for 384.
"""

from __future__ import annotations

import bisect

from hf_async_batching.core.step_layout import Padding

SPREAD_TOKENS = 384
"""Query tokens, padding included, up to which a step is filled if prompts are spread over decode steps.

Up to this number, one more token costs about half of what it costs in a step full of prompts (on an H100, 8 to 9
against 18 microseconds of products in an 8B model); from there to 512, 12.
"""

# Sizes of steps with prompts. A larger step takes the device longer than launching its kernels takes the host.
PADDED_TOKENS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, SPREAD_TOKENS, 512, 768, 1024)
_PADDED_ENTRIES = (16, 64)
# Room for padding in a full step: one token for padded samples, and entries for decoding rows.
_ROOM = 32
MOST_PADDED = PADDED_TOKENS[-1] + _ROOM

# With weights of this many bytes, computing `MOST_PADDED` tokens takes about as long as launching the kernels.
_PADDED_WEIGHTS = 16e9


def decode_buckets(max_rows: int, least: int = 1) -> list[int]:
    """Sizes of decode steps that get a graph: 1, 2, 4, 8, then steps of 8 to 64, 16 to 128, 32 above.

    Args:
        max_rows: Rows of the largest step.
        least: The smallest size, even if `max_rows` is below. Compiled code runs from 2 tokens on, and a second token
            costs nothing in a model whose weights are read for one.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_rows + 32, 32)]
    return [*[size for size in sizes if least <= size < max_rows], max(max_rows, least)]


def padded_decodes(max_rows: int) -> list[int]:
    """Numbers of decoding rows in captured steps with prompts: 0, 8, then steps of 32 to 256, 128 above.

    They are coarser than `decode_buckets`, because they multiply with the numbers of tokens. A surplus entry costs
    almost nothing: its attention reads one token, and with few tokens a step takes the time of reading the weights.
    """
    sizes = [0, 8, *range(32, 256, 32), *range(256, max_rows + 128, 128)]
    return [*[size for size in sizes if size < max_rows], max_rows]


def padded_entries(entries: int, most: int) -> int:
    """The number of samples and tiles to which `entries` are padded; at most `most`."""
    return next((size for size in _PADDED_ENTRIES if entries <= size < most), most)


def largest_padding(max_batch_tokens: int, max_rows: int, max_samples: int, weight_bytes: int) -> Padding:
    """The largest step with prompts that is worth capturing.

    Args:
        max_batch_tokens: Tokens of the largest step.
        max_rows: Rows that can decode in it.
        max_samples: Tokens that a step can sample.
        weight_bytes: Bytes of the weights that each token is multiplied with.
    """
    worth = int(MOST_PADDED * min(1.0, _PADDED_WEIGHTS / max(weight_bytes, 1)))
    # A full step also has room for padding.
    return Padding(min(worth, max_batch_tokens + _ROOM), max_samples, max_rows)


def padded_tokens(largest: Padding) -> list[int]:
    """Token counts of steps with prompts that get a graph, up to `largest`."""
    sizes = [tokens for tokens in PADDED_TOKENS if tokens <= largest.tokens]
    # Also a full step, if its number of tokens is one of the sizes.
    return [*sizes, largest.tokens] if largest.tokens - _ROOM in sizes else sizes


def spread_room(sizes: list[int], decoding: int) -> int:
    """Prompt tokens next to `decoding` rows in a step of `SPREAD_TOKENS`, or of the next size that leaves some room.

    Args:
        sizes: `padded_decodes` of the total number of rows.
        decoding: Decoding rows in the step.
    """
    decodes, least = sizes[bisect.bisect_left(sizes, decoding)], SPREAD_TOKENS // 8
    size = next((size for size in PADDED_TOKENS if size >= SPREAD_TOKENS and size > decodes + least), 0)
    # One token is padding, because padded samples need a token to point to.
    return max(size - 1 - decodes, least)
