"""Look-ups of four-bit numbers: the tables, and what the PTX computes, instruction by instruction."""

import re
from collections.abc import Callable

import pytest
import torch

from hf_async_batching.linear.quantized.tables import TABLES, bits_of, permute_assembly

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.u32": lambda a, b: a >> b,
}


def prmt(a: int, b: int, selector: int) -> int:
    """`prmt.b32`: each nibble of the selector names one of eight bytes; its fourth bit would repeat a sign."""
    data = (a.to_bytes(4, "little") + b.to_bytes(4, "little"))[:8]
    out = 0
    for place in range(4):
        nibble = selector >> 4 * place & 15
        assert nibble < 8, "a sign would be repeated"
        out |= data[nibble] << 8 * place
    return out


def execute(assembly: str, word: int) -> list[int]:
    """Run PTX of these few instructions, and return its four outputs."""
    values = {"$4": word}

    def read(name: str) -> int:
        return values[name] if name in values else int(name, 0)

    for line in assembly.strip("{ }").split(";"):
        parts = re.split(r"[ ,]+", line.strip())
        if parts[0] in ("", ".reg"):
            continue
        target, *operands = parts[1:]
        operation = prmt if parts[0] == "prmt.b32" else OPERATIONS[parts[0]]
        values[target] = operation(*map(read, operands))
    return [values[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_ptx_looks_every_number_up(table: str, dtype: str) -> None:
    assembly, bits = permute_assembly(table, dtype), [bits_of(value, dtype) for value in TABLES[table]]
    for number in range(256):
        pairs = [number, (number * 7 + 3) % 256, 255 - number, (number * 31 + 9) % 256]
        words = execute(assembly, int.from_bytes(bytes(pairs), "little"))
        got = [half for word in words for half in (word & 0xFFFF, word >> 16)]
        assert got == [*(bits[pair >> 4] for pair in pairs), *(bits[pair & 15] for pair in pairs)]


def test_bits_are_of_the_nearest_value() -> None:
    for values in TABLES.values():
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            want = torch.tensor(values, dtype=torch.float32).to(dtype).view(torch.int16)
            assert [bits_of(value, name) for value in values] == [bits & 0xFFFF for bits in want.tolist()]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_tables_are_those_of_bitsandbytes(kind: str) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    _, state = functional.quantize_4bit(torch.randn(64, 64), quant_type=kind)
    assert torch.equal(state.code, torch.tensor(TABLES[kind]))
