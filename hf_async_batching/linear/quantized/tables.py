"""Tables of 16 values for numbers of 4 bits, and PTX that looks eight of them up at once.

A look-up in memory costs a load for each weight. `prmt` picks four bytes of eight by three bits each, in registers. So
two of them look a byte of four numbers up in both halves of a table of 16 bytes, and a third takes, for each number,
the half that its fourth bit names. 16-bit values have two such tables of bytes.
"""

from __future__ import annotations

import functools
import struct

TABLES: dict[str, tuple[float, ...]] = {
    # Quantiles of a normal distribution, scaled to [-1, 1] (Dettmers et al. 2023, QLoRA, appendix E).
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    # A sign and three bits of magnitude, as bitsandbytes orders them.
    "fp4": (
        *(0.0, 0.005208333333333333, 0.6666666666666666, 1.0, 0.3333333333333333, 0.5, 0.16666666666666666, 0.25),
        *(0.0, -0.005208333333333333, -0.6666666666666666, -1.0, -0.3333333333333333, -0.5),
        *(-0.16666666666666666, -0.25),
    ),
    # Integers with an offset of eight.
    "int4": tuple(float(value) for value in range(-8, 8)),
    # Integers without one.
    "uint4": tuple(float(value) for value in range(16)),
}


def bits_of(value: float, dtype: str) -> int:
    """The 16 bits of the value nearest to `value` in a dtype ("bf16" or "fp16")."""
    if dtype == "fp16":
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to the nearest, ties to even; tables hold no NaN


@functools.cache
def permute_assembly(table: str, dtype: str) -> str:
    """PTX that takes four bytes, and gives the values of their high and of their low halves.

    Operands: $0 and $1 get the values of the high halves of bytes 0, 1 and 2, 3; $2 and $3 those of the low halves; $4
    is the four bytes.

    Args:
        table: A key of `TABLES`.
        dtype: "bf16" or "fp16".
    """
    values = [bits_of(value, dtype) for value in TABLES[table]]
    lines = [
        ".reg .b32 u, v, low, high, first, second, a, b, c, d;",
        "and.b32 low, $4, 0x77777777;",
        "shr.u32 high, $4, 1;",
        "and.b32 high, high, 0x44444444;",
        "or.b32 high, high, 0x32103210;",
        "shr.u32 first, low, 16;",
        "shr.u32 second, high, 16;",
    ]
    for shift, small, large in ((0, "a", "c"), (8, "b", "d")):
        planes = [sum((values[4 * word + byte] >> shift & 0xFF) << 8 * byte for byte in range(4)) for word in range(4)]
        for numbers, half, out in (("low", "high", small), ("first", "second", large)):
            lines += [
                f"prmt.b32 u, {planes[0]:#010x}, {planes[1]:#010x}, {numbers};",
                f"prmt.b32 v, {planes[2]:#010x}, {planes[3]:#010x}, {numbers};",
                f"prmt.b32 {out}, u, v, {half};",
            ]
    lines += [
        "prmt.b32 $0, a, b, 0x7351;",
        "prmt.b32 $1, c, d, 0x7351;",
        "prmt.b32 $2, a, b, 0x6240;",
        "prmt.b32 $3, c, d, 0x6240;",
    ]
    return "{ " + " ".join(lines) + " }"
