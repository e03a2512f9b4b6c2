"""A new row's record: its fields, by name and as the int32 columns that the device reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hf_async_batching.core import row_layout
from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.plan import NewRow
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.core.row_layout import MAX_EOS, NEW_ROW, PARAMS, ROW_PARAMS
from hf_async_batching.core.row_record import check_encodable, record_of


def fields_of(request: Request, row: int = 3, start: int = 0) -> dict[str, Any]:
    array = np.array([record_of(NewRow(row, request, start))], NEW_ROW)
    return {name: array[name][0].tolist() for name in NEW_ROW.names or ()}


def test_columns_follow_from_the_fields() -> None:
    """Every column of the device is the place of a field, without gaps."""
    assert NEW_ROW.itemsize == 4 * (1 + PARAMS)
    columns = [row_layout.TEMPERATURE, row_layout.TOP_K, row_layout.SEED_LOW, row_layout.SEED_HIGH]
    assert columns == [0, 1, 5, 6]
    assert row_layout.DECAY + 2 == row_layout.REMOVE_INVALID, "a double takes two columns"
    assert row_layout.FIRST_EOS + MAX_EOS == PARAMS
    words = np.zeros(1, ROW_PARAMS)
    words["eta"], words["decay_start"] = 0.25, 7
    flat = words.view(np.int32)
    assert flat[row_layout.DECAY_START] == 7
    assert flat[row_layout.ETA : row_layout.ETA + 1].view(np.float32)[0] == 0.25
    assert np.count_nonzero(flat) == 2


def test_fields() -> None:
    sampling = SamplingParams(
        True, 0.25, 12, 0.5, 0.125, 2**63 - 1, top_h=0.375, typical_p=0.625, epsilon_cutoff=0.25, eta_cutoff=0.125
    )
    logits = LogitsParams((), 1.5, 0.75, 3, 4, 7, 1.1, True, True)
    request = Request("a", (1, 2, 3, 4), 9, 2, (7, 0), sampling, logits, padding=(0, 0, 0), output_scores=True)
    request = replace(request, position_shifts=(0, -3, -3, -3))
    assert fields_of(request, start=32) == {
        "position_shifts": [0, -3, -3, -3, 0],
        "row": 3,
        "temperature": 0.25,
        "top_k": 12,
        "top_p": 0.5,
        "min_p": 0.125,
        "do_sample": 1,
        "seed": 2**63 - 1,
        "min_length": 6,
        "start": 32,
        "max_length": 13,
        "prompt_length": 4,
        "padding": 3,
        "repetition_penalty": 1.5,
        "encoder_penalty": 0.75,
        "ngram": 3,
        "encoder_ngram": 4,
        "decay_start": 7,
        "decay": 1.1,
        "remove_invalid": 1,
        "renormalize": 1,
        "top_h": 0.375,
        "typical_p": 0.625,
        "epsilon": 0.25,
        "eta": 0.125,
        "eos": [7, 0, *[-1] * (MAX_EOS - 2)],
    }


def test_scores_that_are_not_returned_are_not_renormalized() -> None:
    request = Request("a", (1,), 9, logits=LogitsParams(renormalize=True))
    assert fields_of(request)["renormalize"] == 0


@pytest.mark.parametrize(
    ("given", "kept"),
    [(1e-45, float(np.finfo(np.float32).tiny)), (3.4e38, float(np.float32(3.4e38))), (1.0, 1.0)],
)
def test_temperatures_stay_within_what_kernels_divide_by(given: float, kept: float) -> None:
    assert fields_of(Request("a", (1,), 9, sampling=SamplingParams(True, given)))["temperature"] == kept


def test_top_p_of_zero_keeps_the_most_probable_token() -> None:
    assert fields_of(Request("a", (1,), 9, sampling=SamplingParams(True, top_p=0.0)))["top_p"] > 0


def test_penalties_beyond_float32_are_infinite() -> None:
    logits = LogitsParams(repetition_penalty=1e300, encoder_repetition_penalty=1e300)
    fields = fields_of(Request("a", (1,), 9, logits=logits))
    assert fields["repetition_penalty"] == fields["encoder_penalty"] == float("inf")


def test_more_ends_than_a_record_holds() -> None:
    """The first that some vocabulary can have; the host knows them all."""
    eos = (-1, 2**31, *range(100, 140))
    assert fields_of(Request("a", (1,), 9, 0, eos))["eos"] == list(range(100, 100 + MAX_EOS))


def test_choosers_outside_of_the_engine_leave_nothing_to_the_sampler() -> None:
    sampling = SamplingParams(True, 0.25, 12, 0.5, 0.125, 5)
    fields = fields_of(Request("a", (1, 2, 3, 4), 9, 2, (7,), sampling, chooser=object()))
    assert [fields[name] for name in ("temperature", "top_k", "top_p", "min_p", "do_sample")] == [1, 0, 1, 0, 0]
    assert (fields["min_length"], fields["eos"]) == (0, [-1] * MAX_EOS)


def test_what_a_record_cannot_hold_is_refused_by_the_name_of_its_request() -> None:
    check_encodable(Request("fits", (1,), 9))
    with pytest.raises(
        ValueError,
        match=r"request long has a number that does not fit .*; the largest integer that they hold is 2147483647",
    ):
        check_encodable(Request("long", (1,), 2**31))
