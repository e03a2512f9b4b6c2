"""One step's inputs as one int32 array: what the host writes, what a single copy sends, what the device reads.

Layout of the array, section after section (sizes in `Sections`)::

    new rows    [new_rows, 1 + PARAMS]   row, then its record of parameters and where it starts
    new pages   [new_pages, 3]           row, index, page
    writes      [3, writes]              row, column and value of words of the rows' memories (see `row_layout`)
    given       [2, given]               row, and its last token, which a chooser outside of the engine has chosen
    decode      [decode]                 row of each decoding entry, padded with row 0 up to the bucket
    tokens      [3, tokens]              token id (-1: carry-over), row, offset within the row's piece
    samples     [samples]                index into tokens of each sampled position
    tiles       [4, tiles]               row, first query, number of queries, offset within the row's piece

Either the decode section is used (every row decodes one token) or the last three are (prompts are in the step). Of a
step that is to be captured these are padded, too: with tokens of row 0, samples of these, and tiles without tokens.
Floats travel as their bit patterns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hf_async_batching.core.plan import NewRow, Plan
from hf_async_batching.core.request import Request
from hf_async_batching.core.row_layout import MAX_INT32, float32, row_writes

IntArray = npt.NDArray[np.int32]

MAX_EOS = 16  # a power of two, as the kernels want it

# Columns of a row's record of parameters.
(
    TEMPERATURE,
    TOP_K,
    TOP_P,
    MIN_P,
    DO_SAMPLE,
    SEED_LOW,
    SEED_HIGH,
    MIN_LENGTH,
    START,
    MAX_LENGTH,
    PROMPT_LENGTH,
    PADDING,
    REPETITION_PENALTY,
    ENCODER_PENALTY,
    NGRAM,
    ENCODER_NGRAM,
    DECAY_START,
    DECAY_LOW,
    DECAY_HIGH,
    REMOVE_INVALID,
    RENORMALIZE,
    TOP_H,
    TYPICAL_P,
    EPSILON,
    ETA,
    FIRST_EOS,
) = range(26)
PARAMS = FIRST_EOS + MAX_EOS

CARRY_OVER = -1

# Kernels may take smaller numbers for 0, and dividing -inf by an infinite number makes NaN.
_TEMPERATURES = (float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max))
_LEAST_TOP_P = 1e-9  # keeps the most probable token, as 0 does

_ONE = int(np.array([1.0], np.float32).view(np.int32)[0])


class Padding(NamedTuple):
    """What a step with prompts is padded to.

    Attributes:
        tokens: Query tokens, more than the step has.
        entries: Samples and tiles of its prompts.
        decodes: Tokens, samples and tiles of the rows that decode, which are the first.
    """

    tokens: int
    entries: int
    decodes: int = 0

    @property
    def sections(self) -> Sections:
        """Sizes of the sections, if there were no others."""
        count = self.decodes + self.entries
        return Sections(tokens=self.tokens, samples=count, tiles=count, decodes=self.decodes)


class Sections(NamedTuple):
    """Sizes of the sections, in entries; of a padded step also how many of its tokens are kept for what decodes."""

    new_rows: int = 0
    new_pages: int = 0
    decode: int = 0
    tokens: int = 0
    samples: int = 0
    tiles: int = 0
    writes: int = 0
    decodes: int = 0
    given: int = 0

    @property
    def padding(self) -> Padding:
        """What a step was padded to that has these sections."""
        return Padding(self.tokens, self.samples - self.decodes, self.decodes)

    @property
    def total(self) -> int:
        """Length of the array."""
        return self.updates_end + self.decode + self.tokens * 3 + self.samples + self.tiles * 4

    @property
    def writes_start(self) -> int:
        """Where the writes to the rows' memories begin."""
        return self.new_rows * (1 + PARAMS) + self.new_pages * 3

    @property
    def updates_end(self) -> int:
        """Where the updates of the tables end, and the step's own inputs begin."""
        return self.given_start + self.given * 2

    @property
    def given_start(self) -> int:
        """Where the tokens begin that choosers have chosen."""
        return self.writes_start + self.writes * 3

    @classmethod
    def largest(
        cls, *, max_rows: int, max_batch_tokens: int, num_pages: int, writes: int = 0, drafted: int = 0
    ) -> Sections:
        """Sizes that no step exceeds; `drafted` positions are sampled beyond one per row."""
        samples, tiles = max_rows + drafted, max_batch_tokens + max_rows
        return cls(max_rows, num_pages, max_rows, max_batch_tokens, samples, tiles, writes, given=max_rows)


NO_PADDING = Padding(0, 0)


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
        out: At least as long as the result's `total`.
        bucket: Entries of the decode section, at least `len(plan.decode_rows)`.
        send_decode_rows: Whether the decode section is written in a step without prompts.
        tile_size: Query tokens per tile of prefill attention.
        padding: What a step with prompts is padded to, if it is.

    Returns:
        The sizes that were written.
    """
    cursor = 0

    def section(size: int) -> IntArray:
        nonlocal cursor
        view = out[cursor : cursor + size]
        cursor += size
        return view

    new_rows, new_pages = len(plan.new_rows), len(plan.new_pages)
    if new_rows:
        section(new_rows * (1 + PARAMS)).reshape(new_rows, -1)[:] = [_record(new_row) for new_row in plan.new_rows]
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
    """Write what the memories of new rows begin with; returns how many words."""
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


def check_encodable(request: Request) -> None:
    """Refuse what a record of parameters does not hold: here, and not when the step is made that it starts with.

    Raises:
        ValueError: Some number is beyond the table's type.
    """
    try:
        np.array(_record(NewRow(0, request)), np.int32)
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"request {request.request_id} holds a number that the engine's tables do not: {error}"
        ) from error


def _record(new_row: NewRow) -> list[int]:
    request = new_row.request
    sampling, logits = request.sampling, request.logits
    outside = request.chooser is not None
    temperature, top_p, min_p, repetition, encoder, top_h, typical_p, epsilon, eta = (
        np.array(
            [
                min(max(sampling.temperature, _TEMPERATURES[0]), _TEMPERATURES[1]),
                max(sampling.top_p, _LEAST_TOP_P),
                sampling.min_p,
                float32(logits.repetition_penalty),
                float32(logits.encoder_repetition_penalty),
                sampling.top_h,
                sampling.typical_p,
                sampling.epsilon_cutoff,
                sampling.eta_cutoff,
            ],
            np.float32,
        )
        .view(np.int32)
        .tolist()
    )
    seed = np.array([sampling.seed], np.int64).view(np.int32).tolist()
    decay = np.array([logits.decay_factor], np.float64).view(np.int32).tolist()
    # The device needs not know all of them: the host decides which token ends a request, and a row that the device
    # does not take for finished is computed once more for nothing. An id that no vocabulary has cannot be sampled.
    ends = () if outside else request.eos_token_ids  # a chooser says itself when its request has ended
    eos = [token for token in ends if 0 <= token <= MAX_INT32][:MAX_EOS]
    return [
        new_row.row,
        _ONE if outside else temperature,
        0 if outside else sampling.top_k,
        _ONE if outside else top_p,
        0 if outside else min_p,
        0 if outside else int(sampling.do_sample),
        *seed,
        0 if outside else len(request.prompt) + request.min_new_tokens,
        new_row.start,
        len(request.prompt) + request.max_new_tokens,
        len(request.prompt),
        len(request.padding),
        repetition,
        encoder,
        logits.no_repeat_ngram_size,
        logits.encoder_no_repeat_ngram_size,
        logits.decay_start,
        *decay,
        int(logits.remove_invalid),
        int(logits.renormalize and request.output_scores),
        top_h,
        typical_p,
        epsilon,
        eta,
        *eos,
        *[-1] * (MAX_EOS - len(eos)),
    ]
