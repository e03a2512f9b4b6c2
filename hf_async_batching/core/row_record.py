"""A new row's record, in the layout of `row_layout`."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_async_batching.core.plan import NewRow
from hf_async_batching.core.request import Request
from hf_async_batching.core.row_layout import MAX_EOS, MAX_INT32, MAX_POSITION_DIMS, NEW_ROW, float32

# Kernels may flush smaller numbers to 0, and -inf divided by infinity is NaN.
_LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)
_LARGEST_TEMPERATURE = float(np.finfo(np.float32).max)
_LEAST_TOP_P = 1e-9  # keeps the most probable token, as 0 does


def check_encodable(request: Request) -> None:
    """Refuse a request that does not fit in a record, before a step uses it.

    Raises:
        ValueError: A number is out of its field's range.
    """
    try:
        np.array([record_of(NewRow(0, request))], NEW_ROW)
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"request {request.request_id} has a number that does not fit the engine's tables ({error}); the largest "
            f"integer that they hold is {MAX_INT32}"
        ) from error


def record_of(new_row: NewRow) -> tuple[Any, ...]:
    """The fields of `NEW_ROW`, in order."""
    request = new_row.request
    sampling, logits = request.sampling, request.logits
    if request.chooser is None:
        # The device need not know all end tokens. The host decides which token ends a request; a row that the device
        # does not mark as finished is only computed once more in vain. An id outside every vocabulary is never
        # sampled.
        eos = [token for token in request.eos_token_ids if 0 <= token <= MAX_INT32][:MAX_EOS]
        choice = (
            min(max(sampling.temperature, _LEAST_TEMPERATURE), _LARGEST_TEMPERATURE),
            sampling.top_k,
            max(sampling.top_p, _LEAST_TOP_P),
            sampling.min_p,
            sampling.do_sample,
        )
        min_length = len(request.prompt) + request.min_new_tokens
    else:
        # A chooser outside the engine draws by itself, and reports itself when its request has ended.
        eos, choice, min_length = [], (1.0, 0, 1.0, 0.0, False), 0
    return (
        new_row.row,
        *choice,
        sampling.seed,
        min_length,
        new_row.start,
        len(request.prompt) + request.max_new_tokens,
        len(request.prompt),
        len(request.padding),
        float32(logits.repetition_penalty),
        float32(logits.encoder_repetition_penalty),
        logits.no_repeat_ngram_size,
        logits.encoder_no_repeat_ngram_size,
        logits.decay_start,
        logits.decay_factor,
        logits.remove_invalid,
        logits.renormalize and request.output_scores,
        sampling.top_h,
        sampling.typical_p,
        sampling.epsilon_cutoff,
        sampling.eta_cutoff,
        (*request.position_shifts, *[0] * (MAX_POSITION_DIMS - len(request.position_shifts))),
        eos + [-1] * (MAX_EOS - len(eos)),
    )
