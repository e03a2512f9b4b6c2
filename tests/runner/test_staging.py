"""The step's array, read back by the layout that the module's docstring promises."""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy as np
import pytest

from hf_async_batching.core import row_layout
from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.plan import Chunk, NewPage, NewRow, Plan
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.core.row_layout import HISTORY_START, MAX_EOS, MAX_POSITION_DIMS, PARAMS, Rule, RuleKind
from hf_async_batching.core.step_layout import CARRY_OVER, Padding, Sections
from hf_async_batching.runner.staging import encode

SENTINEL = -77


def encoded(
    plan: Plan, *, bucket: int | None = None, send: bool = True, tile_size: int = 4, padding: Padding | None = None
) -> tuple[Sections, list[int]]:
    """Sections and the array; nothing may be written beyond the promised total."""
    out = np.full(2000, SENTINEL, np.int32)
    size = len(plan.decode_rows) if bucket is None else bucket
    sections = encode(plan, out, bucket=size, send_decode_rows=send, tile_size=tile_size, padding=padding)
    assert (out[sections.total :] == SENTINEL).all(), "more was written than announced"
    assert (out[: sections.total] != SENTINEL).all(), "less was written than announced"
    return sections, out[: sections.total].tolist()


def decoded(sections: Sections, array: list[int]) -> dict[str, list[Any]]:
    """By the documentation alone: rows of each section, the transposed ones turned."""
    shapes = [
        ("new_rows", sections.new_rows, 1 + PARAMS, False),
        ("new_pages", sections.new_pages, 3, False),
        ("writes", sections.writes, 3, True),
        ("decode", sections.decode, 1, False),
        ("tokens", sections.tokens, 3, True),
        ("samples", sections.samples, 1, False),
        ("tiles", sections.tiles, 4, True),
    ]
    out: dict[str, list[Any]] = {}
    start = 0
    for name, count, width, transposed in shapes:
        flat = array[start : start + count * width]
        start += count * width
        if transposed:
            out[name] = [tuple(flat[i::count]) for i in range(count)]
        elif width == 1:
            out[name] = flat
        else:
            out[name] = [tuple(flat[i * width : (i + 1) * width]) for i in range(count)]
    assert start == len(array)
    return out


def bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def double(value: float) -> tuple[int, int]:
    return struct.unpack("<ii", struct.pack("<d", value))


def test_sizes_add_up() -> None:
    assert Sections().total == 0
    assert PARAMS == 25 + MAX_POSITION_DIMS + MAX_EOS
    assert Sections(2, 3, 5, 7, 11, 13, 17).total == 2 * (1 + PARAMS) + 3 * 3 + 17 * 3 + 5 + 7 * 3 + 11 + 13 * 4


def test_a_new_row() -> None:
    sampling = SamplingParams(True, 0.7, 50, 0.9, 0.05, 2**62 + 2**31 + 5)
    request = Request("a", (1, 2, 3), 9, 4, (7, 0), sampling, position_shifts=(0, -5, -5))
    plain = Request("b", (1,), 9, 0, (7,))
    sections, array = encoded(Plan(0, (), new_rows=(NewRow(3, request, 48), NewRow(1, plain))))
    assert sections == Sections(new_rows=2)
    first, second = decoded(sections, array)["new_rows"]
    assert first[:11] == (3, bits(0.7), 50, bits(0.9), bits(0.05), 1, -(2**31) + 5, 2**30, 7, 48, 12)
    neutral = (0, bits(1.0), bits(1.0), 0, 0, 0, *double(1.0), 0, 0, 0, bits(1.0), 0, 0)
    assert first[11:] == (3, *neutral, 0, -5, -5, 0, 0, 7, 0, *[-1] * (MAX_EOS - 2))
    shifts, eos = [0] * MAX_POSITION_DIMS, [7, *[-1] * (MAX_EOS - 1)]
    assert second == (1, bits(1.0), 0, bits(1.0), 0, 0, 0, 0, 1, 0, 10, 1, *neutral, *shifts, *eos)


def test_more_end_of_sequence_tokens_than_the_device_knows() -> None:
    """The first that some vocabulary can have; the host knows them all."""
    eos = (-1, 2**31, *range(100, 140))
    sections, array = encoded(Plan(0, (), new_rows=(NewRow(1, Request("a", (1,), 9, 0, eos)),)))
    record = decoded(sections, array)["new_rows"][0]
    assert record[1 + row_layout.FIRST_EOS :] == tuple(range(100, 100 + MAX_EOS))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (row_layout.TEMPERATURE, bits(0.25)),
        (row_layout.TOP_K, 12),
        (row_layout.TOP_P, bits(0.5)),
        (row_layout.MIN_P, bits(0.125)),
        (row_layout.DO_SAMPLE, 1),
        (row_layout.SEED_LOW, -1),
        (row_layout.SEED_HIGH, 2**31 - 1),
        (row_layout.MIN_LENGTH, 6),
        (row_layout.START, 32),
        (row_layout.MAX_LENGTH, 13),
        (row_layout.PROMPT_LENGTH, 4),
        (row_layout.PADDING, 3),
        (row_layout.REPETITION_PENALTY, bits(1.5)),
        (row_layout.ENCODER_PENALTY, bits(0.75)),
        (row_layout.NGRAM, 3),
        (row_layout.ENCODER_NGRAM, 4),
        (row_layout.DECAY_START, 7),
        (row_layout.DECAY, double(1.1)[0]),
        (row_layout.DECAY + 1, double(1.1)[1]),
        (row_layout.REMOVE_INVALID, 1),
        (row_layout.RENORMALIZE, 1),
        (row_layout.TOP_H, bits(0.375)),
        (row_layout.TYPICAL_P, bits(0.625)),
        (row_layout.EPSILON, bits(0.25)),
        (row_layout.ETA, bits(0.125)),
        (row_layout.FIRST_EOS, 4),
        (row_layout.FIRST_EOS + MAX_EOS - 1, 4 + MAX_EOS - 1),
    ],
)
def test_columns_of_a_record(column: int, value: int) -> None:
    sampling = SamplingParams(
        True, 0.25, 12, 0.5, 0.125, 2**63 - 1, top_h=0.375, typical_p=0.625, epsilon_cutoff=0.25, eta_cutoff=0.125
    )
    logits = LogitsParams((), 1.5, 0.75, 3, 4, 7, 1.1, True, True)
    request = Request(
        "a",
        (1, 2, 3, 4),
        9,
        2,
        tuple(range(4, 4 + MAX_EOS)),
        sampling,
        logits,
        padding=(0, 0, 0),
        output_scores=True,
    )
    sections, array = encoded(Plan(0, (), new_rows=(NewRow(1, request, 32),)))
    assert decoded(sections, array)["new_rows"][0][1 + column] == value


def test_choosers_outside_of_the_engine_leave_nothing_to_the_sampler() -> None:
    sampling = SamplingParams(True, 0.25, 12, 0.5, 0.125, 5)
    request = Request("a", (1, 2, 3, 4), 9, 2, (7,), sampling, chooser=object())
    sections, array = encoded(Plan(0, (), new_rows=(NewRow(1, request),)))
    record = decoded(sections, array)["new_rows"][0][1:]
    assert record[:8] == (bits(1.0), 0, bits(1.0), 0, 0, 5, 0, 0)


def test_what_a_row_remembers_from_the_start() -> None:
    rules = (Rule(RuleKind.BIAS, 8, (5, 6), 2.5), Rule(RuleKind.SUPPRESS, 9, position=4))
    ruled = Request("a", (1, 2, 3, 4), 9, logits=LogitsParams(rules), padding=(0, 0))
    plain = Request("b", (7, 8), 9)
    plan = Plan(0, (), new_rows=(NewRow(3, ruled), NewRow(1, plain), NewRow(2, plain, 2, (7, 8))))
    sections, array = encoded(plan)
    writes = decoded(sections, array)["writes"]
    words = [1, -1, 8, bits(2.5), 6, 5, *[-1] * 6, 4, 4, 9, bits(float("-inf")), *[-1] * 8]
    assert writes == [
        *[(3, column, word) for column, word in enumerate(words)],
        *[(3, HISTORY_START + i, 0) for i in range(2)],
        *[(2, HISTORY_START + i, 7 + i) for i in range(2)],
    ]


def test_new_pages() -> None:
    plan = Plan(3, (2,), new_pages=(NewPage(2, 5, 9), NewPage(1, 0, 4)))
    sections, array = encoded(plan, send=False)
    assert sections == Sections(new_pages=2)
    assert decoded(sections, array)["new_pages"] == [(2, 5, 9), (1, 0, 4)]


@pytest.mark.parametrize("bucket", [3, 4, 8])
def test_decode_rows_are_padded_with_row_zero(bucket: int) -> None:
    sections, array = encoded(Plan(0, (5, 2, 9)), bucket=bucket)
    assert sections == Sections(decode=bucket)
    assert array == [5, 2, 9] + [0] * (bucket - 3)


def test_unchanged_decode_rows_are_not_sent() -> None:
    assert encoded(Plan(0, (5, 2, 9)), send=False) == (Sections(), [])


def test_prompts_beside_decoding_rows() -> None:
    plan = Plan(0, (4, 1), (Chunk(2, tuple(range(60, 69)), False), Chunk(3, (80, 81), True), Chunk(5, (90,), True)))
    sections, array = encoded(plan, tile_size=4)
    got = decoded(sections, array)
    assert got["decode"] == [], "the rows are in the token section already"
    assert got["tokens"] == [
        (CARRY_OVER, 4, 0),
        (CARRY_OVER, 1, 0),
        *[(60 + i, 2, i) for i in range(9)],
        (80, 3, 0),
        (81, 3, 1),
        (90, 5, 0),
    ]
    assert got["samples"] == [0, 1, 12, 13]
    assert got["tiles"] == [
        (4, 0, 1, 0),
        (1, 1, 1, 0),
        (2, 2, 4, 0),
        (2, 6, 4, 4),
        (2, 10, 1, 8),
        (3, 11, 2, 0),
        (5, 13, 1, 0),
    ]


def test_padding_is_tokens_of_row_zero() -> None:
    plan = Plan(0, (2, 5), (Chunk(3, (10, 11, 12), 3),))
    assert (plan.num_sampled, plan.num_tiles(2)) == (5, 4)
    sections, array = encoded(plan, tile_size=2, padding=Padding(8, 4, 2))
    assert sections == Padding(8, 4, 2).sections
    found = decoded(sections, array)
    carried = [(CARRY_OVER, 2, 0), (CARRY_OVER, 5, 0)]
    assert found["tokens"] == [*carried, (10, 3, 0), (11, 3, 1), (12, 3, 2), *[(0, 0, 0)] * 3]
    assert found["samples"] == [0, 1, 2, 3, 4, 5], "the last one is padding"
    assert found["tiles"] == [(2, 0, 1, 0), (5, 1, 1, 0), (3, 2, 2, 0), (3, 4, 1, 2), *[(0, 5, 0, 0)] * 2]


def test_padding_of_rows_that_decode_stands_before_the_prompts() -> None:
    plan = Plan(0, (2, 5), (Chunk(3, (10, 11, 12), 1), Chunk(4, (13,), 0)))
    padding = Padding(10, 5, 4)
    sections, array = encoded(plan, tile_size=2, padding=padding)
    assert sections == padding.sections == Sections(tokens=10, samples=9, tiles=9, decodes=4)
    assert sections.padding == padding
    found = decoded(sections, array)
    carried = [(CARRY_OVER, 2, 0), (CARRY_OVER, 5, 0)]
    prompts = [(10, 3, 0), (11, 3, 1), (12, 3, 2), (13, 4, 0)]
    assert found["tokens"] == [*carried, *[(0, 0, 0)] * 2, *prompts, *[(0, 0, 0)] * 2]
    assert found["samples"] == [0, 1, 6, *[8] * 6]
    tiles = [(2, 0, 1, 0), (5, 1, 1, 0), (0, 2, 0, 0), (0, 3, 0, 0), (3, 4, 2, 0), (3, 6, 1, 2), (4, 7, 1, 0)]
    assert found["tiles"] == [*tiles, *[(0, 8, 0, 0)] * 2]


def test_a_step_that_samples_nothing() -> None:
    sections, array = encoded(Plan(0, (), (Chunk(1, (5, 6), False),)), tile_size=1 << 30)
    assert sections == Sections(tokens=2, samples=0, tiles=1)
    assert array == [5, 6, 1, 1, 0, 1, 1, 0, 2, 0]


@pytest.mark.parametrize(("length", "tiles"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_tiles_are_split_by_their_size(length: int, tiles: int) -> None:
    sections, array = encoded(Plan(0, (), (Chunk(1, (3,) * length, True),)), tile_size=4)
    assert sections.tiles == tiles
    lengths = [tile[2] for tile in decoded(sections, array)["tiles"]]
    assert sum(lengths) == length
    assert max(lengths) <= 4


def test_all_sections_at_once_lie_behind_each_other() -> None:
    rng = random.Random(0)
    for _ in range(50):
        rows = rng.sample(range(1, 20), 8)
        decode = tuple(rows[: rng.randint(0, 4)])
        chunks = tuple(
            Chunk(row, tuple(rng.randrange(500) for _ in range(rng.randint(1, 12))), rng.random() < 0.5)
            for row in rows[4 : 4 + rng.randint(1, 4)]
        )
        new_rows = tuple(NewRow(chunk.row, Request(str(chunk.row), (1,), 5)) for chunk in chunks)
        pages = tuple(NewPage(chunk.row, i, rng.randint(1, 99)) for chunk in chunks for i in range(rng.randint(0, 3)))
        plan = Plan(0, decode, chunks, new_rows, pages)
        tile_size = rng.randint(1, 13)
        sections, array = encoded(plan, tile_size=tile_size)
        got = decoded(sections, array)
        assert [row[0] for row in got["new_rows"]] == [chunk.row for chunk in chunks]
        assert got["new_pages"] == list(pages)
        assert [token for token, *_ in got["tokens"]] == [
            *[CARRY_OVER] * len(decode),
            *[token for chunk in chunks for token in chunk.tokens],
        ]
        assert len(got["samples"]) == plan.num_sampled
        # Every token is in one tile, of its own row, at its own offset.
        covered = [(row, query + i, offset + i) for row, query, length, offset in got["tiles"] for i in range(length)]
        assert covered == [(row, query, offset) for query, (_, row, offset) in enumerate(got["tokens"])]
        largest = Sections.largest(max_rows=8, max_batch_tokens=plan.num_tokens, num_pages=12)
        assert all(size <= limit for size, limit in zip(sections, largest, strict=True))
