"""The host's side of a step: write its inputs to one int32 array that a single copy sends (see `step_layout`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hf_async_batching.core.plan import Plan
from hf_async_batching.core.row_layout import NEW_ROW, PARAMS, row_writes
from hf_async_batching.core.row_record import record_of
from hf_async_batching.core.step_layout import CARRY_OVER, Padding, Sections

IntArray = npt.NDArray[np.int32]


def encode(
    plan: Plan,
    out: IntArray,
    *,
    bucket: int,
    send_decode_rows: bool,
    tile_size: int,
    padding: Padding | None = None,
) -> Sections:
    """Write a step's inputs to `out`.

    Args:
        plan: The step.
        out: Array of at least the result's `total` elements.
        bucket: Entries of the decode section, at least `len(plan.decode_rows)`.
        send_decode_rows: Whether the decode section is written in a step without prompts.
        tile_size: Query tokens per tile of prefill attention.
        padding: Sizes to which a step with prompts is padded; None for no padding.

    Returns:
        The sizes of the written sections.
    """
    cursor = 0

    def section(size: int) -> IntArray:
        nonlocal cursor
        view = out[cursor : cursor + size]
        cursor += size
        return view

    new_rows, new_pages = len(plan.new_rows), len(plan.new_pages)
    if new_rows:
        records = section(new_rows * (1 + PARAMS)).view(NEW_ROW)
        records[:] = [record_of(new_row) for new_row in plan.new_rows]
    if new_pages:
        section(new_pages * 3).reshape(new_pages, 3)[:] = np.array(plan.new_pages, np.int32)
    writes, given = _write_memories(plan, section), len(plan.given)
    if given:
        section(2 * given).reshape(2, given)[:] = np.array(plan.given, np.int32).T
    if not plan.chunks:
        if not send_decode_rows:
            return Sections(new_rows, new_pages, writes=writes, given=given)
        decode = section(bucket)
        decode[: len(plan.decode_rows)] = plan.decode_rows
        decode[len(plan.decode_rows) :] = 0
        return Sections(new_rows, new_pages, decode=bucket, writes=writes, given=given)

    num_decodes = len(plan.decode_rows)
    lead = num_decodes if padding is None else padding.decodes
    num_tokens = lead + plan.num_tokens - num_decodes
    size = num_tokens if padding is None else padding.tokens
    tokens = section(3 * size).reshape(3, size)
    tokens[:, num_decodes:lead] = 0
    tokens[:, num_tokens:] = 0
    tokens[0, :num_decodes] = CARRY_OVER
    tokens[1, :num_decodes] = plan.decode_rows
    tokens[2, :num_decodes] = 0
    samples = list(range(num_decodes))
    tiles = [(row, query, 1, 0) for query, row in enumerate(plan.decode_rows)]
    tiles += [(0, query, 0, 0) for query in range(num_decodes, lead)]
    query = lead
    for chunk in plan.chunks:
        length = len(chunk.tokens)
        tokens[0, query : query + length] = chunk.tokens
        tokens[1, query : query + length] = chunk.row
        tokens[2, query : query + length] = np.arange(length)
        tiles += [
            (chunk.row, query + offset, min(tile_size, length - offset), offset)
            for offset in range(0, length, tile_size)
        ]
        query += length
        samples += range(query - chunk.samples, query)
    if padding is not None:
        samples += [num_tokens] * (lead + padding.entries - len(samples))
        tiles += [(0, num_tokens, 0, 0)] * (lead + padding.entries - len(tiles))
    section(len(samples))[:] = samples
    section(4 * len(tiles)).reshape(4, -1)[:] = np.array(tiles, np.int32).T
    decodes = 0 if padding is None else lead
    return Sections(new_rows, new_pages, 0, size, len(samples), len(tiles), writes, decodes, given)


def _write_memories(plan: Plan, section: Callable[[int], IntArray]) -> int:
    """Write the initial memories of new rows; returns the number of words."""
    writes = [
        (new_row.row, *row_writes(new_row.request.padding, new_row.known, new_row.request.logits.rules))
        for new_row in plan.new_rows
        if new_row.known or new_row.request.padding or new_row.request.logits.rules
    ]
    count = sum(len(columns) for _, columns, _ in writes)
    out, start = section(3 * count).reshape(3, count), 0
    for row, columns, values in writes:
        end = start + len(columns)
        out[0, start:end], out[1, start:end], out[2, start:end] = row, columns, values
        start = end
    return count
