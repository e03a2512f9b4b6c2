# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""The row tables of a decode step in two Triton kernels, which replace some twenty small ones of torch's.

The torch code of `RowTables` defines what they do and is their reference. No argument of a launch changes from step to
step, so both can be part of a captured graph. The padding row is never written: entries that share it would race.

The parameters of a kernel have no Python types; `begin_decode` and `commit_decode` are the typed doors.
"""

import torch
import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.core import outcomes as marks
from hf_async_batching.core.row_layout import FIRST_EOS, MAX_EOS, MAX_LENGTH

_FIRST_UNSOUND: tl.constexpr = tl.constexpr(marks.FIRST_UNSOUND)

# Entries per program: few enough that the rows of a large batch are spread over several multiprocessors.
_BLOCK = 64


# Sizes 1 and multiples of 16 would otherwise compile kernels of their own.
@triton.jit(do_not_specialize=["size"])
def begin_decode_kernel(
    decode_rows,
    finished,
    lengths,
    last_token,
    rows,
    token_ids,
    position_ids,
    positions,
    context_lengths,
    size,
    BLOCK: tl.constexpr,
):
    """BLOCK entries of a decode step: from their rows to the inputs of the model and of its attention."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entries < size
    row = tl.load(decode_rows + entries, mask=mask, other=0)
    row = tl.where(tl.load(finished + row) != 0, 0, row)
    length = tl.load(lengths + row)
    token = tl.load(last_token + row)
    tl.store(rows + entries, row, mask=mask)
    tl.store(token_ids + entries, token.to(tl.int64), mask=mask)
    tl.store(position_ids + entries, length.to(tl.int64), mask=mask)
    tl.store(positions + entries, length, mask=mask)
    tl.store(context_lengths + entries, length + 1, mask=mask)


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["tokens", "logprobs"])
def commit_decode_kernel(
    rows,
    context_lengths,
    tokens,
    logprobs,
    records,
    lengths,
    last_token,
    finished,
    out_tokens,
    out_logprobs,
    size,
    PARAMS: tl.constexpr,
    MAX_LENGTH: tl.constexpr,
    FIRST_EOS: tl.constexpr,
    MAX_EOS: tl.constexpr,
    HAS_LOGPROBS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK entries of a decode step: their tokens to the output, and their rows advanced."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entries < size
    outcome = tl.load(tokens + entries, mask=mask, other=0)
    tl.store(out_tokens + entries, outcome, mask=mask)
    token = tl.maximum(tl.maximum(outcome, _FIRST_UNSOUND - outcome), 0)  # see `outcomes.token_of`
    is_none = ((outcome < 0) & (outcome > _FIRST_UNSOUND)).to(tl.int32)
    if HAS_LOGPROBS:
        tl.store(out_logprobs + entries, tl.load(logprobs + entries, mask=mask, other=0.0), mask=mask)
    row = tl.load(rows + entries, mask=mask, other=0)
    length = tl.load(context_lengths + entries, mask=mask, other=0)
    record = records + row.to(tl.int64) * PARAMS
    eos = tl.load(record[:, None] + FIRST_EOS + tl.arange(0, MAX_EOS)[None, :])
    is_eos = tl.max((eos == token[:, None]).to(tl.int32), axis=1)
    # The token that was sampled now is not among the cached ones, and counts.
    is_last = (length + 1 >= tl.load(record + MAX_LENGTH)).to(tl.int32)
    owned = row != 0  # neither padding nor beyond the end
    tl.store(lengths + row, length, mask=owned)
    tl.store(last_token + row, token, mask=owned)
    tl.store(finished + row, is_eos | is_last | is_none, mask=owned)


def begin_decode(
    decode_rows: torch.Tensor, finished: torch.Tensor, lengths: torch.Tensor, last_token: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs of a decode step; entries whose row has finished become padding.

    Args:
        decode_rows: int32 [entries], contiguous, at least one.
        finished: int32 [rows].
        lengths: int32 [rows].
        last_token: int32 [rows].

    Returns:
        Rows int32, token ids int64, positions int64, positions int32, and context lengths int32, all [entries].
    """
    size, device = decode_rows.shape[0], decode_rows.device
    rows, positions, context_lengths = (torch.empty(size, dtype=torch.int32, device=device) for _ in range(3))
    token_ids, position_ids = (torch.empty(size, dtype=torch.int64, device=device) for _ in range(2))
    with torch.cuda.device_of(decode_rows):
        begin_decode_kernel[(triton.cdiv(size, _BLOCK),)](
            decode_rows, finished, lengths, last_token,
            rows, token_ids, position_ids, positions, context_lengths, size, BLOCK=_BLOCK, num_warps=2,
        )  # fmt: skip
    return rows, token_ids, position_ids, positions, context_lengths


def commit_decode(
    rows: torch.Tensor,
    context_lengths: torch.Tensor,
    tokens: torch.Tensor,
    logprobs: torch.Tensor | None,
    *,
    params: torch.Tensor,
    lengths: torch.Tensor,
    last_token: torch.Tensor,
    finished: torch.Tensor,
    out_tokens: torch.Tensor,
    out_logprobs: torch.Tensor,
) -> None:
    """Advance the rows of a decode step, mark those that end with it, and keep what was sampled.

    Args:
        rows: int32 [entries], as `begin_decode` made them; no row but 0 twice.
        context_lengths: int32 [entries], as `begin_decode` made them.
        tokens: int32 [entries], outcomes of what was sampled (see `outcomes`), contiguous.
        logprobs: float32 [entries], contiguous, or None.
        params: int32 [rows, PARAMS].
        lengths: int32 [rows], written.
        last_token: int32 [rows], written.
        finished: int32 [rows], written.
        out_tokens: int32 [at least entries], written.
        out_logprobs: float32 [at least entries], written where `logprobs` is given.
    """
    size = rows.shape[0]
    with torch.cuda.device_of(rows):
        commit_decode_kernel[(triton.cdiv(size, _BLOCK),)](
            rows, context_lengths, tokens, out_logprobs if logprobs is None else logprobs, params,
            lengths, last_token, finished, out_tokens, out_logprobs, size,
            PARAMS=params.shape[1], MAX_LENGTH=MAX_LENGTH, FIRST_EOS=FIRST_EOS, MAX_EOS=MAX_EOS,
            HAS_LOGPROBS=logprobs is not None, BLOCK=_BLOCK, num_warps=2,
        )  # fmt: skip
