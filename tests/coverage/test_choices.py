"""In 16 bits: choices that one bit decides are no mistake, and a mistake is none of these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, PreTrainedModel

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.attention import hf_interface as interface
from hf_async_batching.coverage import check
from hf_async_batching.coverage.check import check_model
from hf_async_batching.coverage.comparison import Comparison
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.coverage.loaded_dtype import as_loaded
from hf_async_batching.coverage.results import CoverageRun
from hf_async_batching.coverage.table import to_markdown
from hf_async_batching.coverage.verdicts import Finding
from hf_async_batching.errors import UnsupportedModelError

CONFIG = BatchingConfig(page_size=16, max_batch_tokens=24, max_rows=4, attach_check=False)


@pytest.fixture
def model() -> PreTrainedModel:
    return as_loaded(tiny_model("LlamaForCausalLM"), torch.bfloat16)


def plant(monkeypatch: pytest.MonkeyPatch, places: int, dtypes: tuple[torch.dtype, ...]) -> list[torch.dtype]:
    """Shift so many log-probabilities of what models of these dtypes are found to say; returns the dtypes served."""
    right = Comparison.__call__
    served: list[torch.dtype] = []

    def shifted(self: Comparison, tokens: list[list[int]], logprobs: list[list[float]]) -> Finding:
        served.append(self._model.dtype)
        if self._model.dtype in dtypes:
            for index in range(places):
                logprobs[1][index] -= 5.0
        return right(self, tokens, logprobs)

    monkeypatch.setattr(Comparison, "__call__", shifted)
    return served


def test_few_tokens_beyond_are_choices_where_float32_is_exact(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    served = plant(monkeypatch, 3, (torch.bfloat16,))
    verdict = check_model(model, config=CONFIG)
    # Each way in is tried in float32 by itself.
    assert served == [torch.bfloat16, torch.float32] * 2
    for found in (verdict, verdict.generate):
        assert (found.status, found.beyond) == ("within rounding", 3)
        assert found.reason.startswith("3 of 72 tokens beyond the tolerance of ")
        assert found.reason.endswith(": choices that one bit decides; with the same weights in float32 it is exact")
    assert verdict.served and verdict.route == "packed"
    assert model.dtype == torch.bfloat16
    # The table says so, which of other rounding it does not.
    text = to_markdown([CoverageRun("cpu", "bfloat16", "5.24.0", classes={"A": verdict})])
    assert f" | within rounding | {verdict.plain_padded} | {verdict.reason}" in text


@pytest.mark.parametrize(
    ("places", "dtypes", "tried"),
    [(4, (torch.bfloat16,), False), (3, (torch.bfloat16, torch.float32), True)],
    ids=["too many", "in float32, too"],
)
def test_more_tokens_or_also_in_float32_is_wrong(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, places: int, dtypes: tuple[torch.dtype, ...], tried: bool
) -> None:
    served = plant(monkeypatch, places, dtypes)
    verdict = check_model(model, config=CONFIG)
    assert (torch.float32 in served) == tried
    for found in (verdict, verdict.generate):
        assert (found.status, found.beyond) == ("wrong", places)
        assert found.reason.startswith(f"{places} of 72 tokens beyond the tolerance of ")
        assert ("with the same weights in float32 it is wrong; 3 of 72 tokens beyond" in found.reason) == tried


def test_a_mistake_in_16_bits_alone_is_wrong(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    """It changes most tokens, and float32 is exact."""
    right = interface.paged_attention_forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, weights = right(*args, **kwargs)
        return (out * 1.5 if out.dtype == torch.bfloat16 else out), weights

    monkeypatch.setitem(AttentionInterface._global_mapping, interface.NAME, wrong)
    verdict = check_model(model, config=CONFIG)
    assert verdict.status == verdict.generate.status == "wrong"
    assert verdict.beyond > 0.05 * verdict.tokens
    assert check_model(model.to(torch.float32), config=CONFIG).exact  # type: ignore[arg-type]


def test_what_keeps_float32_from_being_served_is_said(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    plant(monkeypatch, 3, (torch.bfloat16,))
    right = GenerationManager.submit

    def submit(self: GenerationManager, *args: Any, **kwargs: Any) -> Any:
        if self.model.dtype == torch.float32:
            raise UnsupportedModelError("not in float32")
        return right(self, *args, **kwargs)

    monkeypatch.setattr(GenerationManager, "submit", submit)
    verdict = check_model(model, config=CONFIG)
    assert verdict.status == "wrong"
    assert verdict.reason.endswith("with the same weights in float32 it is refused; not in float32")


def test_float32_shows_nothing_where_it_is_served_otherwise(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    right = check._serve

    def serve(model: PreTrainedModel, *args: Any) -> tuple[Finding, str]:
        found, route = right(model, *args)
        return found, route if model.dtype == torch.bfloat16 else "single"

    plant(monkeypatch, 3, (torch.bfloat16,))
    monkeypatch.setattr(check, "_serve", serve)
    verdict = check_model(model, config=CONFIG)
    assert (verdict.status, verdict.route) == ("wrong", "packed")
    assert verdict.reason.endswith("with the same weights in float32 it is exact, served as single")
