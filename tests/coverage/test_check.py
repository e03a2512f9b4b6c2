"""The check itself: it can say right, wrong and refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from support.tiny_models import tiny_model
from transformers import AttentionInterface

from hf_async_batching import BatchingConfig, GenerationManager, generate
from hf_async_batching.attention import hf_interface as interface
from hf_async_batching.coverage import check, families
from hf_async_batching.coverage.check import check_model, prompt_lengths
from hf_async_batching.coverage.families import MIN_DISTINCT, check_family, class_names
from hf_async_batching.coverage.plain_reference import LENGTHS, NEW_TOKENS, make_prompts, reference
from hf_async_batching.coverage.variants import VARIANTS
from hf_async_batching.coverage.verdicts import Verdict
from hf_async_batching.devices import failure
from hf_async_batching.errors import UnsupportedArgumentError
from hf_async_batching.model.small.length_thresholds import length_thresholds
from hf_async_batching.model.small.tiny_configs import tiny_config

CONFIG = BatchingConfig(page_size=16, max_batch_tokens=24, max_rows=4, attach_check=False)


def test_prompts() -> None:
    prompts = make_prompts(97)
    assert tuple(map(len, prompts)) == LENGTHS
    assert prompts[-1][:36] == prompts[1][:36]
    assert prompts[-1] != prompts[1]
    assert prompts == make_prompts(97)


def test_exact() -> None:
    verdict = check_model(tiny_model("Llama"))
    assert (verdict.status, verdict.reason, verdict.route) == ("exact", "", "packed")
    assert verdict.distinct_tokens >= MIN_DISTINCT
    assert (verdict.generate.status, verdict.plain_padded, verdict.exact) == ("exact", "the same", True)
    assert verdict.tokens == verdict.generate.tokens == NEW_TOKENS * len(LENGTHS)
    assert verdict.difference is not None and verdict.difference < 1e-3


@pytest.mark.parametrize("factor", [1.5, 1.01])
def test_wrong(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """A difference that changes no token is seen as well."""
    right = interface.paged_attention_forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, weights = right(*args, **kwargs)
        return out * factor, weights

    monkeypatch.setitem(AttentionInterface._global_mapping, interface.NAME, wrong)
    verdict = check_model(tiny_model("Llama"), config=CONFIG)
    assert verdict.status == "wrong"
    assert "of 72 tokens beyond the tolerance of 0.002" in verdict.reason
    assert verdict.other_tokens > 0 or factor < 1.1


@pytest.mark.parametrize("status", ["refused", "failed", "wrong"])
def test_the_drop_in_is_tried_too(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    """Each way in has a finding of its own."""

    @functools.wraps(generate)
    def changed(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if status == "refused":
            raise UnsupportedArgumentError("no padding")
        if status == "failed":
            raise ZeroDivisionError("oh")
        return generate(model, (input_ids + 1) % model.config.vocab_size, **kwargs)

    monkeypatch.setattr(check, "generate", changed)
    verdict = check_model(tiny_model("Llama"), config=CONFIG)
    assert verdict.status == "exact"
    assert verdict.generate.status == status
    assert not verdict.exact


def test_an_error_through_submit_is_a_finding_beside_the_drop_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenerationManager, "submit", lambda *a, **k: 1 / 0)
    verdict = check_model(tiny_model("Llama"), config=CONFIG)
    assert (verdict.status, verdict.reason) == ("failed", "ZeroDivisionError: division by zero")
    assert verdict.generate.status == "exact"


def test_what_is_known_is_reported_before_the_next_way_in_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may crash in the second; what the first came to stays known."""
    reports: list[Verdict] = []

    @functools.wraps(generate)
    def crashes(*_: Any, **__: Any) -> Any:
        assert [(verdict.status, verdict.drop_in) for verdict in reports] == [("exact", None)]
        raise ZeroDivisionError

    monkeypatch.setattr(check, "generate", crashes)
    assert check_model(tiny_model("Llama"), config=CONFIG, report=reports.append).generate.status == "failed"
    assert [verdict.generate.status for verdict in reports] == ["exact", "failed"]


def test_a_lost_gpu_is_a_crash_and_ends_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a device-side assert whatever else is tried in this process fails, and says nothing of the model."""

    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered\nand much advice")

    monkeypatch.setattr(failure.torch, "zeros", lost)
    assert check._lost(torch.device("cpu")) is None
    found = check._lost(torch.device("cuda"))
    assert found is not None
    assert (found.status, found.reason) == ("crashed", "RuntimeError: CUDA error: device-side assert triggered")
    monkeypatch.undo()
    monkeypatch.setattr(check, "_lost", lambda _: found)
    monkeypatch.setattr(check, "_drop_in", lambda *_: pytest.fail("tried on a device that is lost"))
    for error in (RuntimeError("CUDA error"), UnsupportedArgumentError("a refusal that the assert caused")):

        def failing(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(GenerationManager, "submit", failing)
        verdict = check_model(tiny_model("Llama"), config=CONFIG)
        assert (verdict.status, verdict.generate.status) == ("crashed", "crashed")


def test_prompts_go_beyond_what_a_config_has() -> None:
    model = tiny_model("Mistral")
    model.config.sliding_window = 100
    lengths, not_reached = prompt_lengths(model)
    assert not_reached == ()
    assert any(length > 100 for length in lengths)
    assert any(length < 100 < length + NEW_TOKENS for length in lengths)
    assert prompt_lengths(model, longest=60) == (LENGTHS, ("sliding_window",))


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variants_can_be_built(name: str) -> None:
    """Each sets something that the class's config has, to something else than its tiny config."""
    class_name, changes = name.partition("+")[0], VARIANTS[name]
    model_class: Any = getattr(transformers, class_name)
    usual = tiny_config(model_class.config_class).to_dict()
    changed = tiny_config(model_class.config_class, **changes).to_dict()
    assert changed != usual


@pytest.mark.parametrize(
    ("name", "longer_than"), [("Llama4", 8), ("MiniMaxM3VL", 8), ("Gemma3", 16), ("Lfm2", 0), ("DeepseekV32", 16)]
)
def test_prompts_go_beyond_each_length_of_the_tiny_models(name: str, longer_than: int) -> None:
    config = families.tiny_model(f"{name}ForCausalLM").config
    thresholds = length_thresholds(config)
    assert max(thresholds.values(), default=0) >= longer_than
    assert all(value < max(LENGTHS) for value in thresholds.values())


def test_tiny_models_have_what_real_ones_have() -> None:
    """Layers of each kind, several groups of states, windows: what a batch can get wrong."""
    kinds = {
        "Lfm2ForCausalLM": {"conv", "full_attention"},
        "MiniMaxM3VLForCausalLM": {"full_attention", "minimax_m3_sparse"},
        "LagunaForCausalLM": {"full_attention", "sliding_attention"},
        "ZayaForCausalLM": {"hybrid", "hybrid_sliding"},
    }
    for name, expected in kinds.items():
        assert set(families.tiny_model(name).config.layer_types) == expected, name
    groups = {"NemotronHForCausalLM": "n_groups", "FalconH1ForCausalLM": "mamba_n_groups"}
    for name, field in groups.items():
        assert getattr(families.tiny_model(name).config, field) == 2, name


def test_a_model_that_does_not_generate_has_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama")
    monkeypatch.setattr(type(model), "generate", lambda *a, **k: 1 / 0)
    verdict = check_model(model)
    assert verdict.status == "no reference"
    assert "ZeroDivisionError" in verdict.reason


def test_a_class_that_cannot_be_built_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("no such size")

    monkeypatch.setattr(families, "tiny_model", broken)
    assert check_family("LlamaForCausalLM").status == "not built"


def test_reference_says_what_generate_says() -> None:
    model = tiny_model("Llama")
    known = reference(model, make_prompts(97, (5, 2)), 3)
    assert [len(tokens) for tokens in known.tokens] == [3, 3]
    assert all(value <= 0 for values in known.logprobs for value in values)


def test_every_class_is_walked() -> None:
    names = class_names()
    assert len(names) > 150
    assert {"LlamaForCausalLM", "GPT2LMHeadModel", "MambaForCausalLM", "BloomForCausalLM"} <= set(names)
    assert not any(name.startswith("Auto") for name in names)


@pytest.mark.parametrize("name", ["Llama", "DeepseekV3", "Qwen3Next", "Bart", "Mamba2", "Gemma3Text"])
def test_tiny_configs(name: str) -> None:
    config = tiny_config(getattr(transformers, f"{name}Config"))
    assert config.hidden_size <= 64
    assert config.num_hidden_layers <= 4
    changed = tiny_config(getattr(transformers, f"{name}Config"), vocab_size=50)
    assert changed.vocab_size == 50
