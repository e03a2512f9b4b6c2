"""transformers' own batching, on the tiny model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import greedy_alone
from transformers import PreTrainedModel

from hf_async_batching.bench import peer_generate, peer_generate_batch
from hf_async_batching.bench.choices import PEERS
from hf_async_batching.bench.peers import run_peer
from hf_async_batching.bench.shapes import random_model
from hf_async_batching.bench.workloads import Workload, make_workload


@pytest.fixture
def model() -> PreTrainedModel:
    return random_model("tiny", torch.device("cpu"), torch.float32)


def mix(seed: int) -> Workload:
    return make_workload("mix", 211, seed=seed, rows=4, prompt=12, new=7)


def chat(seed: int) -> Workload:
    return make_workload("chat", 211, seed=seed, rows=2, prompt=8, new=5, turns=2)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_makes_the_same_tokens_and_leaves_the_model_alone(model: PreTrainedModel, name: str) -> None:
    attention, generation = model.config._attn_implementation, model.generation_config
    model.generation_config.eos_token_id = 5
    run = run_peer(name, model, mix, repeats=2)
    assert run.error is None
    assert run.output_tokens == mix(0).new_tokens
    assert run.tokens == {
        r.request_id: greedy_alone(model, list(r.prompt), r.max_new_tokens, eos_token_id=-1) for r in mix(0).first
    }
    assert run.seconds is not None and run.output_tokens_per_second == run.output_tokens / run.seconds
    assert run.attention is not None and "sdpa" in run.attention
    assert model.config._attn_implementation == attention
    assert model.generation_config is generation
    assert generation.eos_token_id == 5
    assert "tokens" not in run.as_dict()


@pytest.mark.parametrize("name", PEERS)
def test_peers_hold_conversations(model: PreTrainedModel, name: str) -> None:
    run = run_peer(name, model, chat)
    assert run.error is None
    assert set(run.tokens) == {"0", "0.1", "1", "1.1"}
    assert run.output_tokens == chat(0).new_tokens


def test_generate_batch_tells_when_first_tokens_came(model: PreTrainedModel) -> None:
    run = run_peer("generate_batch", model, mix)
    assert run.first_token_seconds is not None and run.seconds is not None
    assert 0 < run.first_token_seconds.p95 < run.seconds


def test_tokens_for_nothing_are_mentioned(model: PreTrainedModel) -> None:
    assert any("longest row of its batch" in note for note in run_peer("generate", model, mix).notes)
    same = run_peer("generate", model, lambda seed: make_workload("seed", 211, seed=seed, rows=2, prompt=4, new=3))
    assert same.notes == []


def test_generate_halves_a_batch_that_does_not_fit(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: Any = model.generate
    sizes = []

    def generate(ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        if arguments["max_new_tokens"] > 4:
            sizes.append(len(ids))
            if len(ids) > 1:
                raise torch.OutOfMemoryError("too much")
        return whole(ids, **arguments)

    monkeypatch.setattr(model, "generate", generate)
    run = run_peer("generate", model, lambda seed: make_workload("seed", 211, seed=seed, rows=3, prompt=4, new=6))
    assert run.error is None
    assert run.settings == {"rows": 1}
    assert sizes == [3, 2, 1, 1, 1]
    assert run.notes == ["out of memory with 3 rows", "out of memory with 2 rows"]


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_fails_says_so(model: PreTrainedModel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image\nfor this device")

    attention = model.config._attn_implementation
    module, function = (peer_generate, "_padded") if name == "generate" else (peer_generate_batch, "_converse")
    monkeypatch.setattr(module, function, fail)
    run = run_peer(name, model, mix)
    assert run.seconds is None
    assert run.error is not None and "no kernel image for this device" in run.error
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("name", PEERS)
def test_a_slow_peer_is_given_up(model: PreTrainedModel, name: str) -> None:
    run = run_peer(
        name, model, lambda seed: make_workload("seed", 211, seed=seed, rows=2, prompt=4, new=2000), limit=0.3
    )
    assert run.error is not None and "TimeoutError: stopped" in run.error


def test_the_next_attention_is_tried(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peer_generate_batch, "_ON_CPU", ("flash_attention_2", "eager"))
    run = run_peer("generate_batch", model, mix)
    assert run.error is None
    assert run.attention is not None and "eager" in run.attention
    assert len(run.notes) == 1
    assert run.notes[0].startswith("flash_attention_2: ")
    assert "generate_batch with flash_attention_2" in caplog.text, "said at once: others may take long"


def test_missing_tokens_are_an_error(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        peer_generate, "_padded", lambda _model, requests, _deadline: {r.request_id: [1] for r in requests}
    )
    run = run_peer("generate", model, mix)
    assert run.error is not None and "4 tokens of 4 requests came back" in run.error
