# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Tiles of MXFP4 weights in registers: read as they lie, unpacked to bfloat16, multiplied by activations.

A word of 32 bits holds 8 neighbours along the inner dimension. Nibbles `i` and `i + 4` are unpacked together, as the
halves of one register: two masks and one integer product put the sign of each to bit 15 and its other bits to bits 8
to 6. As bfloat16 that is the value times 2 ** -126, subnormal values included. One product with the scale's power of
two makes it exact. So 8 weights take 17 instructions.

The order of the inner dimension is free if activations have the same order. In this one, each thread's part of a tile
is contiguous words of a row, already in the registers in which the tensor cores take it.
"""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]


@triton.jit
def _scaled(pair, scale, ASM: tl.constexpr):
    """Two bfloat16 values of a register, times a scale that is there twice: [..., 2]."""
    if ASM:
        # A product as a sum with -0.0 exists on all cards with bfloat16, and keeps the sign of zeros.
        pair = tl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }",
            "=r,r,r",
            [pair, scale],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
        low = pair.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        high = (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        factor = (scale << 16).to(tl.float32, bitcast=True)
        low = ((pair << 16).to(tl.float32, bitcast=True) * factor).to(tl.bfloat16)
        high = ((pair & 0xFFFF0000).to(tl.float32, bitcast=True) * factor).to(tl.bfloat16)
    return tl.join(low, high)


@triton.jit
def _unpacked(words, scales, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr):
    """Bfloat16 [ROWS, words, 2, 2, 2], in the order of the inner dimension.

    `words` is int32 [ROWS, BLOCK_K / 8], `scales` uint8 [ROWS, BLOCK_K / 32]. A scale above 128 becomes infinite, so
    that its weights show themselves: powers of two up to 2 are exact.
    """
    WORDS: tl.constexpr = BLOCK_K // 8
    scale = (tl.minimum(scales.to(tl.uint32), 129) + 126) * 0x00800080
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], [ROWS, WORDS // 4, 4]), [ROWS, WORDS])
    words = words.to(tl.uint32, bitcast=True)
    upper = words >> 8
    first = _scaled(((words & 0x000F000F) * 0x1040) & 0x81C081C0, scale, ASM)
    second = _scaled(((words & 0x00F000F0) * 0x0104) & 0x81C081C0, scale, ASM)
    third = _scaled(((upper & 0x000F000F) * 0x1040) & 0x81C081C0, scale, ASM)
    fourth = _scaled(((upper & 0x00F000F0) * 0x0104) & 0x81C081C0, scale, ASM)
    return tl.join(tl.join(first, third), tl.join(second, fourth))


@triton.jit
def _reordered(tile, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[ROWS, BLOCK_K] in the order in which both operands are multiplied.

    Four threads share a row of an operand. In a step of 16 elements, each takes two neighbours in the first half and
    two in the second. Here these are the halves of a quarter's words.
    """
    tile = tl.reshape(tile, [ROWS, 4, BLOCK_K // 32, 2, 2, 2])
    return tl.reshape(tl.permute(tile, (0, 4, 5, 2, 1, 3)), [ROWS, BLOCK_K])


@triton.jit
def packed_sums(
    total,
    words_at,
    scales_at,
    x_at,
    inside,
    present,
    INNER,
    scale_g,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """`total` [ROWS, BLOCK_M] plus the products of ROWS outputs' weights and BLOCK_M tokens over INNER elements.

    The pointers are those of the first tile: words [ROWS, BLOCK_K / 8], scales [ROWS, BLOCK_K / 32], and activations
    [BLOCK_M, BLOCK_K]. Only outputs `inside` [ROWS] and tokens `present` [BLOCK_M] are read.
    """
    WORDS: tl.constexpr = BLOCK_K // 8
    GROUPS: tl.constexpr = BLOCK_K // 32
    for k in range(0, INNER, BLOCK_K):
        if EVEN_K and EVEN_N:
            words = tl.load(words_at, eviction_policy="evict_first")
            scales = tl.load(scales_at, eviction_policy="evict_first")
            x = tl.load(x_at, mask=present[:, None], other=0.0, eviction_policy="evict_last")
        elif EVEN_K:
            words = tl.load(words_at, mask=inside[:, None], other=0, eviction_policy="evict_first")
            scales = tl.load(scales_at, mask=inside[:, None], other=0, eviction_policy="evict_first")
            x = tl.load(x_at, mask=present[:, None], other=0.0, eviction_policy="evict_last")
        else:
            # By groups, so that Triton sees that the 4 words of a group share their mask, and copies 16 bytes.
            word_there = inside[:, None] & (k // 32 + tl.arange(0, WORDS) // 4 < INNER // 32)[None, :]
            scale_there = inside[:, None] & (k // 32 + tl.arange(0, GROUPS) < INNER // 32)[None, :]
            words = tl.load(words_at, mask=word_there, other=0, eviction_policy="evict_first")
            scales = tl.load(scales_at, mask=scale_there, other=0, eviction_policy="evict_first")
            x_there = (k + tl.arange(0, BLOCK_K) < INNER)[None, :]
            x = tl.load(x_at, mask=present[:, None] & x_there, other=0.0, eviction_policy="evict_last")
        weight = _reordered(_unpacked(words, scales, ROWS, BLOCK_K, ASM), ROWS, BLOCK_K).to(x.dtype)
        x = _reordered(x, BLOCK_M, BLOCK_K)
        total = tl.dot(weight, tl.trans(x), total, input_precision="ieee")
        words_at += WORDS
        scales_at += GROUPS * scale_g
        x_at += BLOCK_K
    return total


@triton.jit
def expand_kernel(
    words,
    scales,
    out,
    N,
    INNER,
    words_e,
    words_n,
    scales_e,
    scales_n,
    scales_g,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: BLOCK_N x BLOCK_K weights of one expert, unpacked to `out` [experts, N, INNER].

    The strides of words are in groups.
    """
    expert = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) * BLOCK_K
    word = k // 8 + tl.arange(0, BLOCK_K // 8)
    group = k // 32 + tl.arange(0, BLOCK_K // 32)
    there = (n < N)[:, None]
    found = tl.load(
        words + 4 * (expert * words_e + n[:, None].to(tl.int64) * words_n) + word[None, :],
        mask=there & (word // 4 < INNER // 32)[None, :],
        other=0,
    )
    scale = tl.load(
        scales + expert * scales_e + n[:, None].to(tl.int64) * scales_n + group[None, :] * scales_g,
        mask=there & (group < INNER // 32)[None, :],
        other=0,
    )
    weight = tl.reshape(_unpacked(found, scale, BLOCK_N, BLOCK_K, ASM), [BLOCK_N, BLOCK_K])
    at = k + tl.arange(0, BLOCK_K)
    tl.store(
        out + (expert * N + n[:, None]) * INNER + at[None, :],
        weight.to(out.dtype.element_ty),
        mask=there & (at < INNER)[None, :],
    )
