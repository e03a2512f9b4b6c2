"""The check itself: it can say right, wrong and refused."""

from __future__ import annotations

from typing import Any

import pytest
from support.tiny_models import tiny_model
from transformers import AttentionInterface

from hf_async_batching import BatchingConfig
from hf_async_batching.attention import interface
from hf_async_batching.coverage.check import LENGTHS, check_model, make_prompts, reference
from hf_async_batching.coverage.families import MIN_DISTINCT, check_family, class_names
from hf_async_batching.coverage.tiny_configs import tiny_config

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
    assert ("token" if factor > 1.1 else "log-probabilities") in verdict.reason


def test_a_model_that_does_not_generate_has_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama")
    monkeypatch.setattr(type(model), "generate", lambda *a, **k: 1 / 0)
    verdict = check_model(model)
    assert verdict.status == "no reference"
    assert "ZeroDivisionError" in verdict.reason


def test_a_class_that_cannot_be_built_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_async_batching.coverage import families

    def broken(*_: Any) -> Any:
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
    import transformers

    config = tiny_config(getattr(transformers, f"{name}Config"))
    assert config.hidden_size <= 64
    assert config.num_hidden_layers <= 4
    changed = tiny_config(getattr(transformers, f"{name}Config"), vocab_size=50)
    assert changed.vocab_size == 50
