"""The requests of rows are made from few prepared ones."""

from __future__ import annotations

from typing import Any

import pytest
from support.tiny_models import tiny_model
from transformers import GenerationConfig

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.dataset.rows.row import PreparedRow
from hf_async_batching.dataset.run import row_requests
from hf_async_batching.dataset.run.row_requests import RowRequests


def test_few_prepared_requests_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_requests, "_MAX_TEMPLATES", 3)
    with GenerationManager(tiny_model("Llama"), BatchingConfig(max_sequence_length=64)) as manager:
        requests = RowRequests(manager, GenerationConfig(do_sample=True), {})
        kept: list[int] = []
        for new in (1, 2, 3, 4, 5, 1):
            parameters: dict[str, Any] = {"max_new_tokens": new}
            (job,) = requests.jobs(PreparedRow(0, [5, 6], parameters))
            assert job.request.max_new_tokens == new
            kept.append(len(requests._templates))
    assert kept == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "new"),
    [({"max_length": 12}, [10, 8]), ({"max_new_tokens": 4}, [4, 4]), ({"max_new_tokens": 4, "min_length": 6}, [4, 4])],
)
def test_what_counts_from_the_prompt_is_prepared_for_its_length(fields: dict[str, Any], new: list[int]) -> None:
    with GenerationManager(tiny_model("Llama"), BatchingConfig(max_sequence_length=64)) as manager:
        requests = RowRequests(manager, GenerationConfig(**fields), {})
        made = [requests.jobs(PreparedRow(0, prompt, {}))[0].request for prompt in ([5, 6], [5, 6, 7, 8], [9, 9])]
    assert [request.max_new_tokens for request in made] == [*new, new[0]]
    assert len(requests._templates) == (1 if fields == {"max_new_tokens": 4} else 2)
